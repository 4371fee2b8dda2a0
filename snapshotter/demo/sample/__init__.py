"""The web application inside the sample image, and what it serves."""
