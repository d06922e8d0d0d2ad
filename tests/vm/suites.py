"""What runs in the guest, and as whom: what depends on the user, cgroup v2, systemd or Linux 6.1.

What the machine that runs the lane has proved already is not run again, for an emulated processor
takes its time. Names are pytest's; a test that is named and not there fails the suite.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """What runs as one user."""

    user: str
    tests: tuple[str, ...]
    may_skip: tuple[str, ...] = ()
    """Patterns for the reasons of skips that are right here; any other skip is a failure."""
    without: tuple[str, ...] = ()
    """What is left out of `tests`, by name."""
    timeout_s: float = 15 * 60.0


def _of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{file}::{name}" for name in names)


DOCTOR = "tests/golden/test_doctor_documents.py::test_this_host_is_of_a_kind_that_is_known"
CONTRACT = "tests/contract"
NO_CPU = "tests/contract/test_cgroup_contract.py::test_controller_that_is_not_delegated_is_named"
LIMITS = "tests/integration/test_limits.py"
TRANSACTION = "tests/integration/test_transaction.py"
CONTAINER = "tests/integration/test_container.py"
INSIDE = ("tests/vm/inside/two_users.py", "tests/vm/inside/hub.py", "tests/vm/inside/lacking.py")

# They hold the clock of a real machine against an emulated one. Neither systemd nor the user
# matters to them, and the machine that runs the lane has passed them.
CLOCK = (
    *_of(
        LIMITS,
        "test_a_flood_can_be_interrupted",
        "test_a_flood_is_cut_and_starves_nobody",
        "test_cpu_time_shows_the_line",
        "test_usage",
        "test_wall_time_interrupts_whatever_waits",
        "test_wall_time_shows_the_line",
    ),
    *_of(TRANSACTION, "test_an_endless_loop_that_hears_the_limit_is_rolled_back_too"),
)
# Ten seconds and more each, and the same for whoever is not root: ranged's run will do.
LONG = (
    *_of(
        LIMITS,
        "test_a_disk_limit_below_what_is_in_use",
        "test_disk",
        "test_files_of_a_killed_cell_take_no_room",
        "test_the_ceiling_holds_again_and_again",
    ),
    *_of(CONTAINER, "test_many_cells_leave_no_trace"),
)
# Root's groups on v2. All else that a limit does the lane's own machine has shown, as root.
GROUPS = _of(
    LIMITS,
    "test_cpu_time",
    "test_cpus",
    "test_memory",
    "test_memory_of_earlier_cells_does_not_count",
    "test_reads_are_slowed_down",
    "test_the_shells_fork_bomb",
)
# What else kills a cell plain's run shows, where heads have the cell's own id; with ids apart it is
# as on the lane's own machine. But memory.oom.group is v2's.
OOM = _of(
    TRANSACTION,
    "test_a_killed_cell_changes_nothing[memory]",
    "test_a_killed_cell_changes_nothing[kill all]",
)
# Who cleans up, and with which rights over the processes and groups of the session.
DEATH = _of(
    "tests/integration/test_death.py",
    "test_the_kernel_is_killed",
    "test_kernel_and_init_are_killed_at_once",
    "test_what_a_crash_of_everything_leaves_is_swept_at_the_next_start",
    "test_a_part_is_killed_while_a_cell_runs",
    "test_the_prepared_child_is_killed",
    "test_a_start_that_fails_leaves_nothing",
)
# Layers with user attributes, on a tmpfs of Linux 6.1.
FILES = _of(
    "tests/integration/test_state.py",
    "test_files_anywhere",
    "test_an_open_file_is_written_on",
    "test_a_removed_open_file_is_still_there",
    "test_kinds_of_files",
    "test_programs_see_the_files_of_earlier_cells",
    "test_subprocess_and_multiprocessing_work_in_every_cell",
)
LIFE = _of(
    "tests/kernel/test_life.py",
    "test_restart_begins_a_new_session",
    "test_a_signal_to_the_kernel[busy-9]",
    "test_a_death_under_a_running_cell_is_told_at_once[monitor]",
    "test_what_a_killed_kernel_and_monitor_left_is_swept_at_the_next_start",
)
REPLIES = _of(
    "tests/kernel/test_replies.py",
    "test_a_killed_cell_has_one_error_and_costs_nothing",
    "test_an_error_names_limit_peak_and_remedy",
    "test_every_cell_has_a_container_of_its_own",
)

# Linux 6.1 has no user attributes in a tmpfs. And a controller that is not delegated is nocpu's.
EVERYWHERE = (r"^overlay_opaque: ", r"^here it is$")
NOT_ROOT = (*EVERYWHERE, r"^units of the system are root's$")
NO_IO = r"^(io: )?controller io is not delegated "
SUITES = (
    Suite("root", (DOCTOR, CONTRACT, *GROUPS, *OOM, *INSIDE), EVERYWHERE),
    Suite(
        "ranged",
        (DOCTOR, CONTRACT, LIMITS, *OOM, *DEATH, *FILES, *REPLIES),
        may_skip=NOT_ROOT,
        without=CLOCK,
    ),
    Suite(
        "plain",
        (DOCTOR, CONTRACT, LIMITS, TRANSACTION, CONTAINER, *LIFE),
        may_skip=(*NOT_ROOT, NO_IO),
        without=(*CLOCK, *LONG),
    ),
    Suite("nocpu", (DOCTOR, NO_CPU)),
)
