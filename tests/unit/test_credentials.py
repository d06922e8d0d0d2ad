"""Credentials from the files of docker and podman, and from helpers."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.credentials import Credentials, find_credentials

SECRET = "s3cr3t-pässword"


def encoded(name: str, password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{name}:{password}".encode()).decode()}


class Home:
    """A user's home, with an environment that leads to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.environ = {
            "HOME": str(folder),
            "PATH": f"{self.programs}:/usr/bin:/bin",
            "XDG_RUNTIME_DIR": str(folder / "run"),
        }

    def write(self, path: str, content: Any) -> Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content if isinstance(content, str) else json.dumps(content))
        return target

    def docker(self, **content: Any) -> Path:
        return self.write(".docker/config.json", content)

    def helper(self, name: str, script: str) -> None:
        path = self.write(f"bin/docker-credential-{name}", f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def find(self, registry: str, repository: str = "") -> Credentials | None:
        return find_credentials(registry, repository, environ=self.environ)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_nobody_logged_in(home: Home) -> None:
    assert home.find("ghcr.io") is None
    home.docker()
    home.write("run/containers/auth.json", "")
    assert home.find("ghcr.io") is None


@pytest.mark.parametrize(
    "key", ["ghcr.io", "https://ghcr.io", "https://ghcr.io/v1/", "http://ghcr.io/v2"]
)
def test_dockers_keys(home: Home, key: str) -> None:
    home.docker(auths={"other.io": encoded("no"), key: encoded("me")})
    found = home.find("ghcr.io", "a/b")
    assert found == Credentials("me", SECRET)
    assert found is not None
    assert base64.b64decode(found.basic.partition(" ")[2]).decode() == f"me:{SECRET}"
    assert home.find("xghcr.io") is None


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io"])
def test_dockers_own_registry(home: Home, key: str) -> None:
    home.docker(auths={key: encoded("me")})
    assert home.find("docker.io", "library/debian") == Credentials("me", SECRET)


def test_podmans_keys_may_name_a_part_of_a_registry(home: Home) -> None:
    auths = {"quay.io": encoded("all"), "quay.io/team": encoded("team")}
    home.write("run/containers/auth.json", {"auths": auths})
    for repository, name in (("team/app", "team"), ("teamwork/app", "all"), ("", "all")):
        assert home.find("quay.io", repository) == Credentials(name, SECRET)


def test_which_file_comes_first(home: Home) -> None:
    names = {
        "own.json": "named",
        ".docker/config.json": "docker",
        "run/containers/auth.json": "run",
        ".config/containers/auth.json": "config",
    }
    home.environ["REGISTRY_AUTH_FILE"] = str(home.folder / "own.json")
    paths = [home.write(path, {"auths": {"r.io": encoded(n)}}) for path, n in names.items()]
    for path, name in zip(paths, names.values(), strict=True):
        assert home.find("r.io") == Credentials(name, SECRET)
        path.unlink()
    assert home.find("r.io") is None


def test_docker_config_names_a_folder(home: Home) -> None:
    home.environ["DOCKER_CONFIG"] = str(home.folder / "other")
    home.docker(auths={"r.io": encoded("no")})
    home.write("other/config.json", {"auths": {"r.io": encoded("yes")}})
    assert home.find("r.io") == Credentials("yes", SECRET)


def test_tokens_of_a_file(home: Home) -> None:
    home.docker(
        auths={"a.io": {"identitytoken": SECRET}, "b.io": {"registrytoken": SECRET}, "c.io": {}}
    )
    assert home.find("a.io") == Credentials(identity_token=SECRET)
    assert home.find("b.io") == Credentials(registry_token=SECRET)
    assert home.find("c.io") is None


ANSWER = f"""
[ "$#" = 1 ] && [ "$1" = get ] || exit 9
server=$(cat)
printf '{{"ServerURL":"%s","Username":"helped","Secret":"{SECRET}"}}' "$server" | tee "$HOME/said"
"""


def test_a_helper_is_asked_on_its_standard_input(home: Home) -> None:
    home.helper("one", ANSWER)
    home.docker(credHelpers={"r.io": "one"}, auths={"r.io": encoded("no"), "s.io": encoded("s")})
    assert home.find("r.io") == Credentials("helped", SECRET)
    assert '"ServerURL":"r.io"' in (home.folder / "said").read_text()
    assert home.find("s.io") == Credentials("s", SECRET)


def test_dockers_own_registry_has_its_old_name_for_helpers(home: Home) -> None:
    home.helper("one", ANSWER)
    home.docker(credsStore="one")
    assert home.find("docker.io") == Credentials("helped", SECRET)
    assert '"https://index.docker.io/v1/"' in (home.folder / "said").read_text()


def test_a_helper_may_know_a_token(home: Home) -> None:
    home.helper("one", 'echo \'{"Username":"<token>","Secret":"abc"}\'')
    home.docker(credsStore="one")
    assert home.find("r.io") == Credentials(identity_token="abc")


def test_a_helper_may_know_nothing(home: Home) -> None:
    home.helper("one", "echo credentials not found in native keychain; exit 1")
    home.docker(credsStore="one", auths={"r.io": encoded("file")})
    assert home.find("q.io") is None
    assert home.find("r.io") == Credentials("file", SECRET)


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (f"echo {SECRET}; echo {SECRET} >&2; exit 3", "failed with status 3"),
        (f"echo '{SECRET}'", "did not answer with JSON"),
        (f"""echo '{{"Secret":["{SECRET}"]}}'""", "is not a text"),
    ],
)
def test_a_broken_helper_is_named_and_not_quoted(home: Home, script: str, says: str) -> None:
    home.helper("one", script)
    home.docker(credsStore="one")
    with pytest.raises(ImageError) as caught:
        home.find("r.io")
    assert says in str(caught.value)
    assert "docker-credential-one" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_missing_helper_is_named_with_its_file(home: Home) -> None:
    path = home.docker(credsStore="gone")
    with pytest.raises(ImageError, match="docker-credential-gone is not installed") as caught:
        home.find("r.io")
    assert str(path) in caught.value.hint


@pytest.mark.parametrize("name", ["../../bin/sh", "a b", "-x", "x;y"])
def test_a_helper_has_a_plain_name(home: Home, name: str) -> None:
    home.docker(credsStore=name)
    with pytest.raises(ImageError, match="is not the name of a credential helper"):
        home.find("r.io")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (f'{{"auths": "{SECRET}', "is not a JSON object"),
        (f'["{SECRET}"]', "is not a JSON object"),
        (json.dumps({"auths": SECRET}), "auths is not an object"),
        (json.dumps({"auths": {"r.io": {"auth": SECRET}}}), "auth is not NAME:PASSWORD in base64"),
        (json.dumps({"auths": {"r.io": {"auth": "YQ=="}}}), "auth is not NAME:PASSWORD in base64"),
        (json.dumps({"auths": {"r.io": {"auth": [SECRET]}}}), "auth is not a text"),
        (" " * ((1 << 20) + 1), "is too large"),
    ],
)
def test_a_broken_file_is_named_and_not_quoted(home: Home, content: str, says: str) -> None:
    path = home.write(".docker/config.json", content)
    with pytest.raises(ImageError) as caught:
        home.find("r.io")
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__ or SECRET not in repr(caught.value.__context__)


def test_a_pipe_in_the_place_of_the_file_does_not_hang(home: Home) -> None:
    (home.folder / ".docker").mkdir()
    os.mkfifo(home.folder / ".docker/config.json")
    assert home.find("r.io") is None


def test_credentials_are_not_shown() -> None:
    found = Credentials("me", SECRET, SECRET, SECRET)
    assert SECRET not in repr(found)
    assert set(found.secrets) == {SECRET, found.basic.removeprefix("Basic ")}
