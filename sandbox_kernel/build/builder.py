"""Build an image of a Dockerfile: stage by stage, each step from the cache or anew."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime

from sandbox_kernel.build import config as transitions
from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.base import find_base
from sandbox_kernel.build.cache import BuildCache, Hit, Key
from sandbox_kernel.build.context import ContextTree, read_ignore
from sandbox_kernel.build.dockerfile import parse
from sandbox_kernel.build.events import Event, StepBegun, StepEnded, StepMissed, StepOutput, Warned
from sandbox_kernel.build.explain import LastBuild, Step
from sandbox_kernel.build.files import FileSteps, Work
from sandbox_kernel.build.layer import Layer
from sandbox_kernel.build.lint import check, undefined_variables
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.build.place import Place
from sandbox_kernel.build.resolve import Resolved, resolve
from sandbox_kernel.build.run_step import RunStep, key_parts, perform
from sandbox_kernel.build.shown import RunMounts
from sandbox_kernel.build.stage import StageBuild
from sandbox_kernel.build.stages import Kind, Origin, Plan, Stage, plan
from sandbox_kernel.errors import BuildError, ImageError, LaunchError
from sandbox_kernel.image import host
from sandbox_kernel.image.documents import OCI_CONFIG, Descriptor, Manifest
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage

Tell = Callable[[Event], None]

_CHANGING = (ins.Run, ins.Transfer, ins.Workdir)
"""What may change files; all others are of the config only."""


def build(store: Store, options: BuildOptions, tell: Tell) -> StoredImage:
    """Build the target of a Dockerfile and keep it under its names.

    What the cache holds is taken from there. Raises BuildError that names the line, ImageError,
    HostError for a limit that cannot be enforced.
    """
    try:
        text = options.dockerfile.read_bytes()
    except OSError as error:
        raise BuildError(
            f"the Dockerfile {options.dockerfile} cannot be read: {error.strerror}",
            hint="name one with -f FILE",
        ) from error
    dockerfile = parse(text, options.dockerfile.name)
    found = plan(
        dockerfile,
        target=options.target,
        arguments=options.arguments,
        platform=options.platform,
    )
    ignore = read_ignore(options.context, str(options.dockerfile.absolute()))
    with ContextTree(options.context, ignore) as context:
        for finding in check(found, ignore):
            tell(Warned(str(finding)))
        return _Build(store, options, tell, found, context).run()


class _Build:
    def __init__(
        self, store: Store, options: BuildOptions, tell: Tell, found: Plan, context: ContextTree
    ) -> None:
        self._store = store
        self._options = options
        self._tell = tell
        self._plan = found
        self._last = LastBuild(
            store, f"{options.dockerfile.absolute()}\0{options.context.absolute()}"
        )
        self._cache = BuildCache(store)
        self._files = FileSteps(store, options, context, self._built)
        self._mounts = RunMounts(store, options, self._files)
        self._done: dict[int, StageBuild] = {}
        self._triggered: set[int] = set()
        self._number = 0
        self._created = datetime.fromtimestamp(options.epoch_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._arguments = transitions.Arguments(options.arguments, found.scope)

    def run(self) -> StoredImage:
        """Build the stages that the target needs; give the image."""
        try:
            while (stage := self._next()) is not None:
                self._done[stage.index] = self._build_stage(stage)
        finally:
            self._last.close()
        return self._keep(self._done[self._plan.target])

    def _next(self) -> Stage | None:
        """Give the next stage; a trigger of a base image may have brought in more of them."""
        return next((one for one in self._plan.order() if one.index not in self._done), None)

    def _built(self, name: str, stage: Stage, instruction: ins.Instruction) -> StageBuild:
        """Give the stage or the image that `--from=name` means."""
        origin = self._plan.origin(name, stage, instruction.place)
        if origin.kind is Kind.STAGE:
            return self._done[origin.stage]
        return self._begun(stage, origin)

    # Stages

    def _build_stage(self, stage: Stage) -> StageBuild:
        begun_s = self._begin_step(stage, stage.begin.place.text)
        with _blamed(stage.begin.place):
            built = self._begun(stage, stage.origin)
        self._end_step(begun_s, cached=True)
        if (triggers := built.state.triggers) and stage.index not in self._triggered:
            self._triggered.add(stage.index)
            self._plan = self._plan.with_triggers(stage, triggers)
            stage = self._plan.stages[stage.index]
            for needed in sorted(self._plan.needs(stage) - self._done.keys()):
                self._done[needed] = self._build_stage(self._plan.stages[needed])
        for instruction in stage.instructions:
            with _blamed(instruction.place):
                self._perform(stage, built, instruction)
        return built

    def _begun(self, stage: Stage, origin: Origin) -> StageBuild:
        """Give a stage before its first instruction, on an image or on another stage."""
        if origin.kind is Kind.STAGE:
            built = self._done[origin.stage].copy()
            built.state = transitions.inherit(built.state)
            return built
        platform = stage.platform or self._plan.platform
        base = find_base(origin, self._store, platform, self._options.pull)
        state = transitions.begin(base.config)
        return StageBuild(
            self._store, state, base.key, list(base.layers), list(base.history), base.on_host
        )

    # Steps

    def _perform(self, stage: Stage, built: StageBuild, instruction: ins.Instruction) -> None:
        begun_s = self._begin_step(stage, instruction.place.text)
        escape = self._plan.dockerfile.escape
        found = resolve(
            instruction, built.state.variables, built.state.config.working_dir, escape=escape
        )
        declared = built.state.declared
        for finding in undefined_variables(self._plan, instruction, found.unset, declared):
            self._tell(Warned(str(finding)))
        built.state = transitions.apply(
            found.instruction, built.state, self._arguments, escape=escape
        )
        cached, layer = True, None
        if isinstance(instruction, _CHANGING):
            step = _step(stage, instruction)
            with ExitStack() as stack:
                work = self._work(stage, built, found, stack)
                hit = self._hit(step, work.key)
                cached, layer = hit is not None, hit.layer if hit else self._make(work, built)
            built.key = work.key.digest
            self._last.note(step, work.key)
        built.add(layer, self._created, instruction.place.text.strip())
        self._end_step(begun_s, cached=cached, layer=layer)

    def _work(self, stage: Stage, built: StageBuild, found: Resolved, stack: ExitStack) -> Work:
        """Give what a step that changes files depends on, and how it is done."""
        run = found.instruction
        if not isinstance(run, ins.Run):
            return self._files.work(stage, built, found, stack)
        machine = host.host_image() if built.on_host else None
        step = RunStep(run, found.mounts, built.state, self._options, machine)
        needs = self._mounts.depend(run, found.mounts, stage)
        key = Key(built.key, (*key_parts(step), *needs.parts), needs.files)

        def make() -> Layer | None:
            shown = self._mounts.show(run, found.mounts, stage, stack)
            return perform(step, built.mounted(), self._store, shown, output)

        def output(stream: str, data: bytes) -> None:
            self._tell(StepOutput(stream, data))

        return Work(key, make)

    def _hit(self, step: Step, key: Key) -> Hit | None:
        """Look a step up, and say why it is not there."""
        hit = self._cache.find(key) if self._options.use_cache else None
        reason = self._last.why(step, key)
        if hit is None and self._options.explain:
            if not self._options.use_cache:
                reason = "--no-cache"
            elif self._cache.was_built(key):
                reason = "its layer was pruned"
            self._tell(StepMissed(reason or "its record was pruned"))
        return hit

    def _make(self, work: Work, below: StageBuild) -> Layer | None:
        layer = work.make()
        # Unpacked now: a layer that cannot be is the fault of this step, and not of the next.
        if layer is not None:
            below.ensure(layer)
        self._cache.put(work.key, layer)
        return layer

    def _begin_step(self, stage: Stage, title: str) -> float:
        self._number += 1
        total = sum(1 + len(one.instructions) for one in self._plan.order())
        name = stage.title if len(self._plan.order()) > 1 else ""
        self._tell(StepBegun(self._number, total, " ".join(title.split()), name))
        return time.monotonic()

    def _end_step(self, begun_s: float, *, cached: bool, layer: Layer | None = None) -> None:
        wall_s = time.monotonic() - begun_s
        diff_id, size = (layer.diff_id, layer.blob.size_bytes) if layer else ("", 0)
        self._tell(StepEnded(self._number, cached, wall_s, diff_id, size))

    # The image

    def _keep(self, built: StageBuild) -> StoredImage:
        labels = {**dict(built.state.config.labels), **self._options.labels}
        config = built.state.config.replace(
            platform=self._plan.stages[self._plan.target].platform or self._plan.platform,
            labels=tuple(labels.items()),
            diff_ids=tuple(layer.diff_id for layer in built.layers),
            history=tuple(built.history),
            created=self._created,
        )
        raw = config.render()
        blob = Descriptor(OCI_CONFIG, self._store.put_blob(raw), len(raw))
        manifest = Manifest.build(blob, [layer.blob for layer in built.layers])
        kept = [
            self._store.put_image(tag, manifest.raw, manifest.media_type)
            for tag in self._options.tags or (None,)
        ]
        return kept[0]


def _step(stage: Stage, instruction: ins.Instruction) -> Step:
    changing = [one for one in stage.instructions if isinstance(one, _CHANGING)]
    at = next(at for at, one in enumerate(changing) if one is instruction)
    return Step(stage.index, _text(instruction), tuple(map(_text, changing[at + 1 :])))


def _text(instruction: ins.Instruction) -> str:
    return " ".join(instruction.place.text.split())


@contextmanager
def _blamed(place: Place) -> Iterator[None]:
    """Give what goes wrong with an image or a container inside the place of an instruction."""
    with place.blamed():
        try:
            yield
        except BuildError:
            raise
        except (ImageError, LaunchError) as error:
            raise BuildError(error.message, hint=error.hint) from error
