"""What is done with whole images: find their file index, build one, publish it, convert them."""
