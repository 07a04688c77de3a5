"""What the tool promises when something goes wrong, and the tests that hold it to that."""

import dataclasses

RELIABILITY = "tests/reliability"
HOSTILE = f"{RELIABILITY}/test_hostile_inputs.py"
LIMITS = f"{RELIABILITY}/test_limits.py"


@dataclasses.dataclass(frozen=True)
class Promise:
    """A sentence, how it is proven, by which tests, and which counts were kept of the long ones."""

    key: str
    says: str
    proof: str
    tests: tuple[str, ...]
    counts: tuple[str, ...] = ()


PROMISES = (
    Promise(
        "P1",
        "An output path holds the old bytes or the complete new ones, whenever the process is killed.",
        "Real processes are killed at every system call of the writing side; in thought, before and after every step.",
        (
            f"{RELIABILITY}/test_crash_points.py::test_a_sample_of_points",
            f"{RELIABILITY}/test_crash_points.py::test_every_point",
            "tests/storage/test_crashes.py::test_a_kill_at_any_step_leaves_old_or_new_and_one_partial_that_is_named",
        ),
        ("crashes",),
    ),
    Promise(
        "P2",
        "What was reported as done is there after a power cut.",
        "The calls of real runs are recorded, and every state that a disk may be in after each of them is replayed; "
        "the order of flushing and naming is asserted.",
        (
            f"{RELIABILITY}/test_power_cuts.py::test_every_state_after_a_power_cut",
            "tests/storage/test_outputs.py::test_everything_is_flushed_before_it_gets_its_name_and_the_name_after",
        ),
    ),
    Promise(
        "P3",
        "Inputs are opened for reading only and never change, whatever the output is called; one that somebody else "
        "changes meanwhile is an error.",
        "Hashes of all inputs before and after; outputs that are inputs by every name and link (H48, H49).",
        (
            "tests/laws/test_law_7_outputs.py::test_inputs_do_not_change_and_nothing_else_appears",
            "tests/storage/test_files.py::test_the_file_cannot_be_written_through_its_descriptor",
            "tests/storage/test_targets.py::test_an_output_tied_to_an_input_is_refused",
            f"{RELIABILITY}/test_changing_inputs.py::test_a_base_that_changes",
            f"{HOSTILE}::test_every_command_in_processes",
        ),
        ("hostile",),
    ),
    Promise(
        "P4",
        "A disk that is full or fails, a quota, a missing permission: one sentence, exit 73, 74 or 77, nothing left.",
        "Every system call fails in turn with each error; small disks, limits on file sizes, immutable directories, "
        "another user.",
        (
            "tests/storage/test_writer_failures.py::test_every_failing_call_is_a_typed_error_and_leaves_nothing",
            "tests/storage/test_crashes.py::test_an_error_at_any_step_leaves_old_or_new_and_nothing_else",
            f"{LIMITS}::test_a_disk_that_fills_up_meanwhile",
            f"{LIMITS}::test_a_file_that_may_not_grow",
            f"{LIMITS}::test_an_immutable_directory",
            f"{LIMITS}::test_another_user",
        ),
        ("crashes",),
    ),
    Promise(
        "P5",
        "Room on the disk is checked and reserved before anything is computed.",
        "A disk that is too small: refused in less than a second, nothing written.",
        (
            f"{LIMITS}::test_a_full_disk_is_seen_before_anything_is_written",
            f"{LIMITS}::test_a_terabyte_is_refused_where_there_is_no_room",
            "tests/storage/test_writer_failures.py::test_a_full_disk_is_known_before_anything_is_computed",
        ),
    ),
    Promise(
        "P6",
        "Ctrl-C and SIGTERM end a run with 130 and 143 within a second, and leave nothing but the work directory that "
        "`--resume` names.",
        "Signals at random moments, before every line of the writing side, twice, and in the middle of large files.",
        (
            "tests/cli/test_interrupts.py::test_nothing_is_left",
            "tests/cli/test_interrupts.py::test_impatience",
            f"{RELIABILITY}/test_signals.py::test_at_many_random_moments",
            f"{RELIABILITY}/test_signals.py::test_before_every_line",
            f"{LIMITS}::test_a_signal_in_the_middle_of_a_large_file",
        ),
        ("signals", "interrupted_lines"),
    ),
    Promise(
        "P7",
        "`merge --resume` goes on after an interruption at any moment, and its output is that of an uninterrupted run, "
        "byte for byte; other inputs or options are refused, and what a work directory holds is compared before it is "
        "used.",
        "Runs end after every unit, at every system call of the writing side (killed, or failing), before every line "
        "that keeps the journal, and a real model's at random moments; each is gone on with. Inputs, options, bytes, "
        "records with right checksums, and directories are changed in between.",
        (
            f"{RELIABILITY}/test_resumed.py::test_a_sample_of_calls",
            f"{RELIABILITY}/test_resumed.py::test_at_every_call",
            f"{RELIABILITY}/test_resumed.py::test_before_some_lines",
            f"{RELIABILITY}/test_resumed.py::test_before_every_line",
            f"{RELIABILITY}/test_resumed_models.py::test_minilm_killed_three_times",
            f"{RELIABILITY}/test_resumed_models.py::test_minilm_at_many_moments",
            "tests/engine/test_resuming.py::test_going_on_after_any_unit_gives_the_bytes_of_an_uninterrupted_run",
            "tests/engine/test_resuming.py::test_an_input_that_changed_is_refused_by_name",
            "tests/engine/test_resuming.py::test_other_options_are_refused_by_name",
            "tests/engine/test_resuming.py::test_bytes_that_are_not_as_recorded_are_done_again_and_it_is_said",
            "tests/engine/test_resuming_forged.py::test_records_that_cannot_be",
            "tests/engine/test_resuming_forged.py::test_weights_that_are_not_what_was_recorded",
            "tests/engine/test_resuming_forged.py::test_another_base_of_the_same_shapes",
            "tests/storage/test_journal.py::test_any_changed_byte_ends_the_reading",
            "tests/storage/test_work.py::test_what_is_no_regular_file_is_refused_and_stays",
        ),
        ("resumed_crashes", "resumed_lines", "resumed_models"),
    ),
    Promise(
        "P8",
        "The same inputs and options give the same bytes, whatever the number of threads, Python's hash seed, and the "
        "order in which the system lists a directory.",
        "Outputs of processes that differ in these are compared byte for byte.",
        (
            f"{RELIABILITY}/test_same_bytes.py::test_whatever_the_threads_the_hash_seed_and_the_order_of_directories",
            f"{RELIABILITY}/test_same_bytes.py::test_every_combination_of_threads_and_hash_seeds",
            "tests/laws/test_law_2_same_bits.py::test_threads_and_tiles_do_not_show",
        ),
    ),
    Promise(
        "P9",
        "Of several runs to one output one wins, and the others fail clean; what a killed run left stops nobody.",
        "Processes that start at once; a run after one that was killed.",
        (
            f"{RELIABILITY}/test_runs_at_once.py::test_one_of_them_wins",
            f"{RELIABILITY}/test_runs_at_once.py::test_overwriting_runs_all_succeed_and_the_output_is_one_of_theirs",
            f"{RELIABILITY}/test_runs_at_once.py::test_a_killed_run_does_not_block_the_next",
            "tests/storage/test_outputs.py::test_of_two_runs_one_wins",
        ),
    ),
    Promise(
        "P12",
        "Memory follows the largest tensor and the number of tensors (some KB for each), not the bytes of the model.",
        "Sparse terabytes are looked at, and models of growing size merged, under a limit.",
        (
            f"{LIMITS}::test_looking_at_a_terabyte_takes_little_memory",
            f"{LIMITS}::test_merging_takes_memory_by_the_tensor_not_by_the_model",
            "tests/storage/test_shards.py::test_a_terabyte_in_163_shards_opens_in_two_seconds_and_200_megabytes",
            "tests/engine/test_memory.py::test_tiles_do_not_grow_with_the_tensor",
        ),
    ),
    Promise(
        "P13",
        "A hostile file runs nothing, reaches nothing outside of its directory, and exhausts neither time nor memory.",
        "Every input of the table below, through every command that it concerns, as a real process in which an audit "
        "hook notes whatever is started, connected to, unpickled, imported by name, read outside or written elsewhere; "
        "time and memory as the kernel counts them. Headers are mutated and compared with the safetensors library.",
        (
            f"{HOSTILE}::test_every_command_in_processes",
            f"{HOSTILE}::test_in_this_process",
            f"{RELIABILITY}/test_watch.py::test_what_must_not_be_done_is_seen",
            "tests/storage/test_json_cost.py::test_the_estimate_is_above_what_reading_takes",
            "tests/storage/test_differential.py::test_sampled_mutants",
            "tests/storage/test_differential.py::test_many_mutants",
            "tests/test_architecture.py::test_nothing_is_executed_from_a_file",
        ),
        ("hostile", "differential"),
    ),
    Promise(
        "P14",
        "Files and directories get the mode that the umask says.",
        "Outputs under several umasks.",
        (
            f"{LIMITS}::test_the_mode_follows_the_umask",
            "tests/storage/test_writer_failures.py::test_the_mode_follows_the_umask",
            "tests/storage/test_outputs.py::test_the_directorys_mode_follows_the_umask",
        ),
    ),
    Promise(
        "P20",
        "An error is one paragraph that names the file, safe for a terminal; with `--json` one document with a stable "
        "code; and no traceback.",
        "Every refusal of the table below, in both forms; a table of all errors.",
        (
            f"{HOSTILE}::test_in_this_process",
            f"{HOSTILE}::test_every_command_in_processes",
            "tests/cli/test_errors.py::test_every_error_has_its_code",
            "tests/cli/test_errors.py::test_real_failures",
        ),
        ("hostile",),
    ),
)

NOT_YET = (
    "Only `merge` can be gone on with after an interruption; the other commands start again.",
    (
        "The same bits on another machine follow from how numbers are added ([why](maths.md)); no test has crossed to "
        "another machine, and nothing written at a merge lets another machine check them."
    ),
    (
        "The report beside an output (`loratools.json`) may take up to 700 MB to read, where other documents may take "
        "350: it has a row for every module of the largest models."
    ),
    "Power cuts are replayed on a model of a file system. No disk has lost its power for a test.",
    "Nothing has run on a GPU.",
    "Network file systems that ignore locks or flushes: two runs at once, and power cuts, are not tested there.",
    "Owner and extended attributes of a file that is replaced are not kept; its new mode is that of the umask.",
)
