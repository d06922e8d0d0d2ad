"""Probes that are tests of a part of their own, by the file and the name of each."""

from __future__ import annotations

from dataclasses import dataclass

from tests.escape.probe import Probe


@dataclass(frozen=True)
class Elsewhere:
    """A probe, and the tests that are it: `path::name` below tests/."""

    probe: Probe
    tests: tuple[str, ...]


def _row(number: int, name: str, refused: str, *tests: str) -> Elsewhere:
    return Elsewhere(Probe(number, name, refused), tests)


ELSEWHERE = (
    _row(
        26, "USER that is negative, huge or unknown", "refused and named",
        "integration/test_build_run.py::test_a_user_that_cannot_be_is_named",
        "integration/test_images.py::test_a_user_that_the_image_does_not_know_is_named",
    ),
    _row(
        24, "setuid programs of an image that cells run on", "no change of user",
        "integration/test_images.py::test_setuid_programs_of_an_image_give_nothing",
    ),
    _row(
        27, "kill(-1) of a cell", "reaches the cell alone",
        "integration/test_transaction.py::test_kill_all_spares_who_calls_it",
    ),
    _row(
        36, "daemons, stopped jobs, breeders", "gone with the reply",
        "integration/test_container.py::test_nothing_outlives_the_cell_that_started_it",
    ),
    _row(
        37, "half a character, no text, millions of writes", "shown or replaced",
        "integration/test_output.py::test_half_a_character_at_the_end",
        "integration/test_output.py::test_what_is_no_text",
        "integration/test_output.py::test_many_small_writes",
    ),
    _row(
        40, "layers of an image after a job on them", "unchanged",
        "integration/test_job.py::test_lower_layers_show_and_are_hidden",
    ),
    _row(
        41, "tar that climbs, links out, lies about whiteouts or sizes", "refused and named",
        "unit/test_unpack.py::test_what_lies_is_refused_and_nothing_outside_changes",
        "unit/test_unpack.py::test_what_is_cut_off_is_refused",
    ),
    _row(
        41, "gzip and zstd that swell", "refused before it swells",
        "unit/test_compression.py::test_bombs_are_refused_before_they_go_off",
        "unit/test_compression.py::test_zstd_windows_that_take_much_memory_are_refused",
    ),
    _row(
        42, "user tables of an image that are links or huge", "read inside, bounded",
        "integration/test_images.py::test_a_table_that_is_a_link_is_read_inside_of_the_image",
        "integration/test_images.py::test_tables_that_are_no_tables_are_refused",
        "integration/test_build_copy.py::test_tables_that_are_links_or_huge_are_no_way_out",
    ),
    _row(
        43, "links in a build's context", "never followed out",
        "integration/test_build_copy.py::test_links_of_the_context_never_lead_out",
        "integration/test_build_copy.py::test_a_folder_that_became_a_link_is_not_followed",
    ),
    _row(
        44, "mounts of RUN: links, secrets, shared caches", "inside, nowhere, locked",
        "integration/test_build_run.py::test_a_link_at_a_mount_point_leads_nowhere_else",
        "integration/test_build_run.py::test_a_secret_is_seen_by_its_step_and_is_nowhere_in_the_store",
        "integration/test_build_run.py::test_the_ways_to_share_a_cache",
    ),
    _row(
        45, "config of an image with NULs, newlines, wrong types", "refused and named",
        "unit/test_documents.py::test_a_bad_config_is_refused_with_the_reason",
        "unit/test_documents.py::test_no_document_crashes_a_reader",
    ),
    _row(
        45, "environment of an image for a build's helpers", "data of the step alone",
        "integration/test_build_run.py::test_the_environment_is_env_and_args_and_nothing_of_ours",
    ),
    _row(
        46, "names with / and .. and -, digests that are paths", "refused and named",
        "unit/test_reference.py::test_refused",
        "unit/test_store.py::test_no_digest_leads_out_of_the_store",
        "unit/test_store.py::test_a_lock_has_a_plain_name",
    ),
    _row(
        47, "kill -9 of kernel, monitor, init, builder, head", "nothing is left",
        "integration/test_death.py::test_the_kernel_is_killed",
        "integration/test_death.py::test_kernel_and_init_are_killed_at_once",
        "integration/test_death.py::test_a_part_is_killed_while_a_cell_runs",
        "integration/test_death.py::test_a_part_is_killed_between_two_cells",
        "integration/test_death.py::test_what_a_crash_of_everything_leaves_is_swept_at_the_next_start",
    ),
    _row(
        50, "registry: redirects with a login, downgrade to HTTP", "not followed",
        "unit/test_registry_auth.py::test_a_login_does_not_follow_a_redirect",
        "unit/test_registry_auth.py::test_a_redirect_that_is_not_followed",
        "unit/test_registry_auth.py::test_a_registry_elsewhere_may_not_lead_here",
    ),
    _row(
        50, "registry: other content, cut off, endless", "refused and named",
        "unit/test_registry.py::test_a_layer_with_another_content",
        "unit/test_registry.py::test_a_layer_that_goes_on_and_on",
        "unit/test_registry.py::test_a_manifest_that_goes_on_and_on",
        "unit/test_registry_faults.py::test_a_stream_that_ends_early_without_saying_so",
    ),
    _row(
        50, "registry: index loops, foreign layers, URLs", "bounded, not fetched",
        "unit/test_registry.py::test_an_index_in_an_index_is_followed_and_bounded",
        "unit/test_registry.py::test_an_index_that_leads_to_itself_ends_at_its_digest",
        "unit/test_registry.py::test_a_foreign_layer_is_not_fetched_from_its_url",
        "unit/test_registry.py::test_urls_of_a_layer_are_not_used",
    ),
    _row(
        0, "gate: without its listener", "ENOSYS",
        "integration/test_seccomp_real.py::test_without_a_listener_the_asked_calls_do_not_exist",
    ),
)  # fmt: skip
PROBES = tuple(row.probe for row in ELSEWHERE)
DOCUMENTED = (
    Probe(49, "time, load, processors and memory of the machine", "shown, as documented"),
    Probe(39, "locks on files of the machine that sessions share", "possible, as documented"),
)
"""What is no secret from a cell; see docs/security.md, "What is not protected"."""
