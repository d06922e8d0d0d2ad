"""The Dockerfile as typed instructions: the arguments of each one are read by its own rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.flags import read_flags
from sandbox_kernel.build.healthcheck import healthcheck
from sandbox_kernel.build.json_form import json_list
from sandbox_kernel.build.lexer import (
    BLANKS,
    Heredoc,
    Line,
    Source,
    decode,
    heredoc_of,
    lex,
    raw_words,
    split_line,
)
from sandbox_kernel.build.mounts import mount_stage, parse_mount
from sandbox_kernel.build.place import Place
from sandbox_kernel.errors import BuildError

NETWORKS = ("default", "none", "host")

_BLANK = re.compile(rf"[{BLANKS}]+")
_STAGE_NAME = re.compile(r"[a-z][a-z0-9-_.]*")
_ONBUILD = re.compile(r"^\s*ONBUILD\s*", re.IGNORECASE)
_NO_TRIGGER = ("ONBUILD", "FROM", "MAINTAINER")
_TRANSFER = {"texts": ("chown", "chmod"), "repeated": ("exclude",)}


@dataclass(frozen=True)
class Dockerfile:
    """A parsed Dockerfile; `check` is the value of its `# check=` directive."""

    file: str
    instructions: tuple[ins.Instruction, ...]
    escape: str = "\\"
    check: str = ""
    empty_continuations: tuple[Place, ...] = ()


def parse(text: bytes | str, file: str = "Dockerfile") -> Dockerfile:
    """Read a Dockerfile; raises BuildError, which names the line.

    `file` is the name that errors give it.
    """
    source = lex(decode(text, file) if isinstance(text, bytes) else text, file)
    read = tuple(parse_line(line, source) for line in source.lines)
    return Dockerfile(file, read, source.escape, source.check, source.empty_continuations)


def parse_line(line: Line, source: Source) -> ins.Instruction:
    """Give the instruction of one line; raises BuildError."""
    reader = _READERS.get(line.keyword.upper())
    if reader is None:
        close = difflib.get_close_matches(line.keyword.upper()[:40], _READERS, 1)
        raise line.place.error(
            f"there is no instruction {line.keyword}",
            hint=f"did you mean {close[0]}?" if close else "a line before needs a \\ at its end?",
        )
    with line.place.blamed():
        return replace(reader(line, source.escape), comments=line.comments)


def words_of(text: str, escape: str) -> list[str]:
    """Split at blanks outside of quotes; quotes and escapes stay, to be resolved later."""
    words: list[str] = []
    word: list[str] = []
    quote, position = "", 0
    while position < len(text):
        char = text[position]
        if char == escape and quote != "'":
            char = text[position : position + 2]
            # At the very end it escapes nothing.
            word += [char] if len(char) == 2 else []
        elif not quote and char.isspace():
            words.append("".join(word))
            word = []
        else:
            if quote:
                quote = "" if char == quote else quote
            elif char in "'\"":
                quote = char
            word.append(char)
        position += len(char)
    return [one for one in (*words, "".join(word)) if one]


def _one(line: Line) -> str:
    read_flags(line)
    if not line.rest:
        raise line.place.error(f"{line.keyword.upper()} needs one argument", hint="give it")
    return line.rest


def _command(line: Line, rest: str) -> ins.Command:
    argv = json_list(rest)
    if argv is not None:
        return ins.Command(argv, shell=False)
    return ins.Command((rest,), True, line.heredocs, rest.lstrip().startswith("["))


def _run(line: Line, _escape: str) -> ins.Instruction:
    flags = read_flags(
        line,
        texts=("network", "security"),
        repeated=("mount",),
        refused={"device": "RUN has no devices; leave the flag out"},
    )
    for mount in flags.all("mount"):
        mount_stage(mount)
        # With variables it can be read only when their values are known.
        if "$" not in mount:
            parse_mount(mount, _as_it_is)
    network, security = flags.text("network", "default"), flags.text("security", "sandbox")
    if network not in NETWORKS:
        raise BuildError(f"RUN --network={network}", hint=f"one of {', '.join(NETWORKS)}")
    if security != "sandbox":
        raise BuildError(
            f"RUN --security={security} is not supported",
            hint="a build step has no privileges; leave the flag out",
        )
    command = _command(line, line.rest)
    if not any(command.argv):
        raise BuildError("RUN without a command", hint="write RUN and the command after it")
    return ins.Run(line.place, command, flags.all("mount"), network)


def _as_it_is(text: str) -> str:
    return text


def _sources(line: Line) -> tuple[tuple[str, ...], tuple[Heredoc, ...], str]:
    words = json_list(line.rest)
    if words is None:
        # The name of a heredoc may hold blanks, in quotes.
        words = tuple(raw_words(line.rest) if line.heredocs else _BLANK.split(line.rest))
    keyword = line.keyword.upper()
    if len(words) < 2:
        raise BuildError(
            f"{keyword} needs a source and a destination",
            hint=f"write {keyword} SOURCE DESTINATION, for example {keyword} . /app/",
        )
    *sources, destination = words
    if heredoc_of(destination):
        raise BuildError(f"{keyword} to a heredoc", hint="a heredoc is a source only")
    paths = tuple(one for one in sources if not (line.heredocs and heredoc_of(one)))
    return paths, line.heredocs, destination


def _copy(line: Line, _escape: str) -> ins.Instruction:
    flags = read_flags(
        line,
        texts=("chown", "chmod", "from"),
        repeated=("exclude",),
        switches=("link", "parents"),
    )
    sources, documents, destination = _sources(line)
    stage = flags.text("from")
    if "$" in stage[:-1]:
        raise BuildError(
            f"COPY --from={stage} holds a variable",
            hint="name a stage for it: FROM $NAME AS base, then --from=base",
        )
    if "from" in flags.given and not stage:
        raise BuildError("COPY --from without a value", hint="name a stage or an image")
    return ins.Copy(
        line.place,
        sources,
        destination,
        documents,
        chown=flags.text("chown"),
        chmod=flags.text("chmod"),
        link=bool(flags.switch("link")),
        excludes=flags.all("exclude"),
        stage=stage,
        parents=bool(flags.switch("parents")),
    )


def _add(line: Line, _escape: str) -> ins.Instruction:
    flags = read_flags(
        line,
        texts=("chown", "chmod", "checksum"),
        repeated=("exclude",),
        switches=("link", "unpack"),
        refused={"keep-git-dir": "ADD takes no Git repository; RUN git clone instead"},
    )
    sources, documents, destination = _sources(line)
    for source in sources:
        if is_git(source):
            raise BuildError(
                f"ADD of the Git repository {source} is not supported",
                hint="RUN git clone, or clone it into the build context and COPY it",
            )
    checksum = flags.text("checksum")
    if checksum and not (len(sources) == 1 and (is_url(sources[0]) or "$" in sources[0])):
        raise BuildError(
            "ADD --checksum is for one URL", hint="leave it out, or use one ADD for each URL"
        )
    return ins.Add(
        line.place,
        sources,
        destination,
        documents,
        chown=flags.text("chown"),
        chmod=flags.text("chmod"),
        link=bool(flags.switch("link")),
        excludes=flags.all("exclude"),
        checksum=checksum,
        unpack=flags.switch("unpack"),
    )


def is_url(source: str) -> bool:
    """Tell whether ADD fetches this source over HTTP."""
    return source.startswith(("http://", "https://")) and not is_git(source)


def is_git(source: str) -> bool:
    """Tell whether Docker's ADD would clone this source."""
    if source.startswith(("git://", "git@", "ssh://")):
        return True
    path = re.split(r"[#?]", source, maxsplit=1)[0]
    return source.startswith(("http://", "https://")) and path.endswith(".git")


def _pairs(line: Line, escape: str) -> tuple[ins.Pairs, bool]:
    read_flags(line)
    keyword = line.keyword.upper()
    words = words_of(line.rest, escape)
    if not words:
        raise BuildError(f"{keyword} needs a name and a value", hint=f"write {keyword} NAME=VALUE")
    if "=" not in words[0]:
        name, *value = _BLANK.split(line.rest, maxsplit=1)
        if not value:
            raise BuildError(f"{keyword} {name} has no value", hint=f"write {keyword} {name}=VALUE")
        return ((name, value[0]),), True
    for word in words:
        if "=" not in word or word.startswith("="):
            raise BuildError(
                f"{keyword}: {word!r} is not NAME=VALUE",
                hint="put quotes around values with blanks",
            )
    return tuple((name, value) for name, _, value in (one.partition("=") for one in words)), False


def _env(line: Line, escape: str) -> ins.Instruction:
    return ins.Env(line.place, *_pairs(line, escape))


def _label(line: Line, escape: str) -> ins.Instruction:
    return ins.Label(line.place, *_pairs(line, escape))


def _arg(line: Line, escape: str) -> ins.Instruction:
    read_flags(line)
    found: list[tuple[str, str | None]] = []
    for word in words_of(line.rest, escape):
        name, equals, value = word.partition("=")
        if not name:
            raise BuildError(f"ARG {word} has no name", hint="write ARG NAME=DEFAULT")
        found.append((name, value if equals else None))
    if not found:
        raise BuildError("ARG needs a name", hint="write ARG NAME or ARG NAME=DEFAULT")
    return ins.Arg(line.place, tuple(found))


def _from(line: Line, _escape: str) -> ins.Instruction:
    flags = read_flags(line, texts=("platform",))
    words = _BLANK.split(line.rest) if line.rest else []
    name = ""
    if len(words) == 3 and words[1].lower() == "as":
        name = words[2].lower()
        if not _STAGE_NAME.fullmatch(name):
            raise BuildError(
                f"{words[2]!r} is no name for a stage",
                hint="begin with a letter, then letters, digits and - _ . only",
            )
    elif len(words) != 1:
        raise BuildError("FROM takes one image", hint="write FROM IMAGE, or FROM IMAGE AS NAME")
    return ins.From(line.place, words[0], name, flags.text("platform"))


def _cmd(line: Line, _escape: str) -> ins.Instruction:
    return ins.Cmd(line.place, _command(line, _one(line)))


def _entrypoint(line: Line, _escape: str) -> ins.Instruction:
    return ins.Entrypoint(line.place, _command(line, _one(line)))


def _shell(line: Line, _escape: str) -> ins.Instruction:
    argv = json_list(_one(line))
    if not argv:
        raise BuildError("SHELL is a JSON list", hint='write SHELL ["/bin/bash", "-c"]')
    return ins.Shell(line.place, argv)


def _expose(line: Line, _escape: str) -> ins.Instruction:
    return ins.Expose(line.place, tuple(_BLANK.split(_one(line))))


def _volume(line: Line, _escape: str) -> ins.Instruction:
    rest = _one(line)
    paths = json_list(rest)
    paths = tuple(_BLANK.split(rest)) if paths is None else paths
    if not paths or not all(path.strip() for path in paths):
        raise BuildError("VOLUME of an empty path", hint="write VOLUME /PATH")
    return ins.Volume(line.place, tuple(path.strip() for path in paths))


def _onbuild(line: Line, escape: str) -> ins.Instruction:
    trigger = _one(line)
    keyword = split_line(trigger, escape)[0].upper()
    if keyword in _NO_TRIGGER:
        raise BuildError(f"ONBUILD {keyword} is not allowed", hint="remove the line")
    text = _ONBUILD.sub("", line.place.text.strip())
    for heredoc in line.heredocs:
        text += f"\n{heredoc.content}{heredoc.name}"
    inner = replace(line, place=replace(line.place, text=text), heredocs=line.heredocs)
    word, flags, rest = split_line(trigger, escape)
    # Read now, so that a mistake is not found by those who use the image only.
    parse_line(replace(inner, keyword=word, flags=flags, rest=rest), _source(line, escape))
    return ins.OnBuild(line.place, text)


def _source(line: Line, escape: str) -> Source:
    return Source(line.place.file, (), escape, "", ())


_READERS: dict[str, Callable[[Line, str], ins.Instruction]] = {
    "ADD": _add,
    "ARG": _arg,
    "CMD": _cmd,
    "COPY": _copy,
    "ENTRYPOINT": _entrypoint,
    "ENV": _env,
    "EXPOSE": _expose,
    "FROM": _from,
    "HEALTHCHECK": healthcheck,
    "LABEL": _label,
    "MAINTAINER": lambda line, _: ins.Maintainer(line.place, _one(line)),
    "ONBUILD": _onbuild,
    "RUN": _run,
    "SHELL": _shell,
    "STOPSIGNAL": lambda line, _: ins.StopSignal(line.place, _one(line)),
    "USER": lambda line, _: ins.User(line.place, _one(line)),
    "VOLUME": _volume,
    "WORKDIR": lambda line, _: ins.Workdir(line.place, _one(line)),
}
