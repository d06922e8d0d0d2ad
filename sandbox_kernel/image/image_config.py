"""The config of an image: what its processes start with, and the DiffIDs of its layers."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.fields import Fields, parse_object
from sandbox_kernel.image.media import check_digest, digest_of
from sandbox_kernel.image.platform import Platform
from sandbox_kernel.model import Json


@dataclass(frozen=True)
class History:
    """One line of an image's history; an empty layer changed the config only."""

    created: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False
    author: str = ""

    def as_json(self) -> Json:
        """Give the line as it stands in a config."""
        found: Json = {
            "created": self.created,
            "created_by": self.created_by,
            "comment": self.comment,
            "author": self.author,
            "empty_layer": self.empty_layer,
        }
        return {key: value for key, value in found.items() if value}


@dataclass(frozen=True)
class ImageConfig:
    """A config as fields; `raw` are the bytes that it came as, whose digest is the image ID.

    A list that is empty was empty, null or absent. Change one by `replace`.
    """

    platform: Platform
    diff_ids: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    user: str = ""
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()
    exposed_ports: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    shell: tuple[str, ...] = ()
    healthcheck: Json | None = None
    on_build: tuple[str, ...] = ()
    history: tuple[History, ...] = ()
    created: str = ""
    author: str = ""
    raw: bytes = b""

    @property
    def image_id(self) -> str:
        """The digest of the config, which Docker calls the ID of the image."""
        return digest_of(self.raw or self.render())

    @classmethod
    def parse(cls, raw: bytes) -> ImageConfig:
        """Read a config; raises ImageError."""
        fields = Fields(parse_object(raw, "the image's config"), "the image's config")
        root = fields.object("rootfs")
        if root.text("type", "layers") != "layers":
            raise ImageError(f"the image's config: rootfs.type is {root.text('type')!r}")
        run = fields.object("config")
        return cls(
            platform=Platform.read(fields),
            diff_ids=tuple(check_digest(one) for one in root.texts("diff_ids")),
            env=tuple(_split(one) for one in run.texts("Env")),
            working_dir=run.text("WorkingDir"),
            user=run.text("User"),
            entrypoint=run.texts("Entrypoint"),
            cmd=run.texts("Cmd"),
            labels=run.pairs("Labels"),
            exposed_ports=run.names("ExposedPorts"),
            volumes=run.names("Volumes"),
            stop_signal=run.text("StopSignal"),
            shell=run.texts("Shell"),
            healthcheck=run.object("Healthcheck").values or None,
            on_build=run.texts("OnBuild"),
            history=tuple(_history(one) for one in fields.objects("history")),
            created=fields.text("created"),
            author=fields.text("author"),
            raw=raw,
        )

    def replace(self, **changes: Any) -> ImageConfig:
        """Give a config with other values in these fields, rendered anew."""
        changed = dataclasses.replace(self, **changes, raw=b"")
        return dataclasses.replace(changed, raw=changed.render())

    def render(self) -> bytes:
        """Give the config as canonical JSON: keys sorted, no space, empty fields left out."""
        found = {
            **self.platform.as_json(),
            "created": self.created,
            "author": self.author,
            "config": self._run(),
            "rootfs": {"type": "layers", "diff_ids": list(self.diff_ids)},
            "history": [line.as_json() for line in self.history],
        }
        # Some readers want rootfs and config even if nothing is in them.
        kept = {k: v for k, v in found.items() if v or k in {"config", "rootfs"}}
        text = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode()

    def _run(self) -> Json:
        found: Json = {
            "Env": [f"{name}={value}" for name, value in self.env],
            "WorkingDir": self.working_dir,
            "User": self.user,
            "Entrypoint": list(self.entrypoint),
            "Cmd": list(self.cmd),
            "Labels": dict(self.labels),
            "ExposedPorts": {name: {} for name in self.exposed_ports},
            "Volumes": {name: {} for name in self.volumes},
            "StopSignal": self.stop_signal,
            "Shell": list(self.shell),
            "Healthcheck": self.healthcheck,
            "OnBuild": list(self.on_build),
        }
        return {key: value for key, value in found.items() if value}


def _split(variable: str) -> tuple[str, str]:
    name, _, value = variable.partition("=")
    return name, value


def _history(line: Fields) -> History:
    return History(
        created=line.text("created"),
        created_by=line.text("created_by"),
        comment=line.text("comment"),
        empty_layer=line.flag("empty_layer"),
        author=line.text("author"),
    )
