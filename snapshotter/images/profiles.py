"""Startup profiles in a registry: OCI artifacts whose subject is the image's manifest.

Each node may push its own; whoever builds a startup pack merges them. docs/profiles.md.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from index import profile as profiles
from index.errors import FirstByteError, IntegrityError
from snapshotter.registry.digests import digest_of
from snapshotter.registry.image import body_of
from snapshotter.registry.manifest import EMPTY_DESCRIPTOR, EMPTY_JSON, Descriptor, Manifest

if TYPE_CHECKING:
    from index.profile import Profile
    from snapshotter.registry.image import ImageSink, ImageSource, ResolvedImage

log = logging.getLogger(__name__)

PROFILE_TYPE = "application/vnd.firstbyte.profile.v1+json"
"""Type of the artifact, and media type of the blob in it."""

MAX_MERGED = 16
"""Profiles of one image that are read."""


async def publish_profile(sink: ImageSink, subject: Descriptor, profile: Profile) -> Descriptor:
    """Push a profile so that whoever has the image `subject` finds it. The same one is pushed once.

    Returns the descriptor of the artifact's manifest.
    """
    data = profiles.encode(profile)
    blob = Descriptor(media_type=PROFILE_TYPE, digest=digest_of(data), size=len(data))
    await sink.write_blob(EMPTY_DESCRIPTOR, body_of(EMPTY_JSON))
    await sink.write_blob(blob, body_of(data))
    manifest = Manifest.build(
        config=EMPTY_DESCRIPTOR,
        layers=[blob],
        subject=Descriptor(media_type=subject.media_type, digest=subject.digest, size=subject.size),
        artifact_type=PROFILE_TYPE,
    )
    return await sink.write_manifest(manifest, named=False)


async def find_profile(source: ImageSource, image: ResolvedImage) -> Profile | None:
    """What the profiles that were pushed for an image say together; None if there are none.

    One that is damaged or of other layers is logged and passed over. Raises RegistryError.
    """
    found: Profile | None = None
    artifacts = await source.referrers(image.descriptor.digest, PROFILE_TYPE)
    for artifact in artifacts[:MAX_MERGED]:
        try:
            manifest = await source.fetch_manifest(artifact)
            if not isinstance(manifest, Manifest) or len(manifest.layers) != 1:
                raise IntegrityError("the artifact is not one blob")
            data = await source.fetch_blob(manifest.layers[0], max_size=profiles.MAX_SIZE)
            profile = profiles.decode(data)
            check_of(profile, image)
        except FirstByteError as error:
            log.warning("startup profile %s of %s: %s", artifact.digest, image.name, error)
            continue
        found = profile if found is None else profiles.merge(found, profile)
    return found


def check_of(profile: Profile, image: ResolvedImage) -> None:
    """Raise IntegrityError unless a profile is of an image's layers."""
    named = [f"sha256:{diff_id.hex()}" for diff_id in profile.diff_ids]
    if named != image.config.rootfs.diff_ids:
        raise IntegrityError(
            f"the startup profile{f' of {profile.name}' if profile.name else ''} is not of the "
            f"layers of {image.name}",
            hint="record one of this image: start it on a node that does not have it",
        )
