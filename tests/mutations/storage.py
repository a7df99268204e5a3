"""Mutations of files: digests, versions, locks, what is replaced when."""

from __future__ import annotations

from tests.mutations.mutation import of

FILES, DRAWS, RESUME = "storage/test_files.py", "storage/test_draws.py", "infer/mcmc/test_resume.py"
SPOILT = f"{FILES}::test_a_flipped_bit_is_refused_or_changes_nothing"
OTHER = f"{FILES}::test_a_file_of_another_version_kind_or_content_is_refused"
LEFT = (
    f"{FILES}::test_a_part_that_is_being_written_is_left_alone",
    f"{FILES}::test_a_part_that_a_killed_process_left_is_in_nobodys_way",
)
EXISTING = f"{FILES}::test_an_existing_file_is_refused_unless_asked"
LOCKED = (
    f"{DRAWS}::test_a_second_run_on_the_same_file_is_refused_until_the_first_has_ended",
    f"{DRAWS}::test_a_process_that_is_killed_releases_its_file_even_if_its_children_live_on",
)
FLIPPED = f"{DRAWS}::test_a_flipped_bit_is_refused_where_draws_are_checked_and_by_a_resumed_run"

HOSTILE, CHECKPOINTS, FUZZ = "hostile/test_hostile.py", "infer/mcmc/test_checkpoints.py", "fuzz/test_fuzz.py"
DAMAGED = f"{HOSTILE}::test_a_damaged_file_of_any_kind_is_refused_or_read_as_it_was"
KILLED = f"{HOSTILE}::test_a_run_killed_at_a_random_moment_goes_on"
FIVE_HUNDRED = f"{FUZZ}::test_few_of_500_calls_end_in_an_obscure_error_and_none_accepts_nonsense"
NAMED = f"{CHECKPOINTS}::test_a_senseless_field_of_a_whole_file_is_named"
HELD = f"{CHECKPOINTS}::test_a_checkpoint_is_locked_as_long_as_its_run_goes_on"

MUTATIONS = [
    *of(
        "storage/files.py",
        (SPOILT, OTHER, f"{FILES}::test_the_same_bytes_as_other_numbers_are_refused"),
        ("file: the digest is not compared", 'if metadata["digest"] != _digest(', "if None in _digest("),
        ("file: numbers are not in the digest", "found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)", "pass"),
        ("file: content is not in the digest", "json.dumps([VERSION, kind, plain, described])", "json.dumps([VERSION, kind, described])"),
        (
            "file: dtypes and shapes are not in the digest",
            "json.dumps([VERSION, kind, plain, described])",
            "json.dumps([VERSION, kind, plain, names])",
        ),
        ("file: any version", "if found != VERSION:", "if False:"),
        ("file: any kind", 'if metadata.get("kind") != kind:', "if False:"),
    ),
    *of(
        "storage/files.py",
        LEFT,
        ("file: parts that are being written are removed", "if try_lock(file):  #", "if True:  #"),
        ("file: parts of killed processes stay", "left.unlink(missing_ok=True)", "pass"),
    ),
    *of(
        "storage/files.py",
        f"{FILES}::test_a_write_that_fails_leaves_the_old_file_and_nothing_else",
        ("file: what failed stays", "part.unlink(missing_ok=True)", "pass"),
    ),
    *of(
        "storage/files.py",
        f"{FILES}::test_a_planted_link_or_another_persons_file_is_not_written_to",
        (
            "file: a planted file is written to",
            'os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)',
            "os.O_RDWR | os.O_CREAT",
        ),
    ),
    *of(
        "storage/files.py",
        (EXISTING, f"{FILES}::test_a_name_that_no_file_can_have_is_refused"),
        ("file: an existing one is taken", "if path.exists() and not overwrite:", "if False:"),
        ("file: names without room for the part's", '255 - len(_part_of(""))', "255"),
    ),
    *of(
        "storage/files.py",
        f"{FILES}::test_a_missing_or_senseless_field_is_refused_by_name",
        ("file: counts below 0", "type(value) is int and value >= 0", "type(value) is int"),
        ("file: True is a count", "type(value) is int and value >= 0", "isinstance(value, int) and value >= 0"),
    ),
    *of(
        "storage/files.py",
        f"{FILES}::test_nested_values_come_back_as_they_were",
        ("file: tuples come back as lists", 'tuple(unpacked) if kind == "tuple" else unpacked', "unpacked"),
        ("file: arrays in another dtype", '.numpy().astype(value["dtype"])', ".numpy()"),
    ),
    *of(
        "storage/files.py",
        f"{FILES}::test_what_was_loaded_does_not_hang_on_the_file",
        ("file: tensors are mapped", "file.get_tensor(name).clone()", "file.get_tensor(name)"),
    ),
    *of(
        "storage/files.py",
        LOCKED,
        ("lock: shared", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"),
        (
            "lock: an existing file's is not asked for",
            "        if not try_lock(file):\n            raise _in_use(path)",
            "        if False:\n            raise _in_use(path)",
        ),
        ("lock: children hold it", "    for file in closed_in_children:\n        file.close()", "    pass"),
    ),
    *of(
        "storage/files.py",
        (
            "infer/mcmc/test_checkpoints.py::test_a_second_run_is_refused_at_once_before_the_first_has_written_a_checkpoint",
            "infer/mcmc/test_checkpoints.py::test_a_second_run_is_refused_while_the_first_overwrites_an_old_checkpoint",
            "infer/mcmc/test_checkpoints.py::test_a_file_that_is_replaced_while_it_is_locked_is_locked_anew",
        ),
        ("lock: not before the first checkpoint", "        if _remove_left_over(path, own=part):\n", "        if False:\n"),
        (
            "lock: free while an old file is overwritten",
            "        if self._placeholder is None:\n            self._reserve",
            "        if False:\n            self._reserve",
        ),
        (
            "lock: of a replaced file",
            "if os.path.samestat(os.fstat(file.fileno()), path.stat()):\n                    return True",
            "return True",
        ),
    ),
    *of(
        "storage/draws.py",
        LOCKED,
        ("lock: a resumed file's is not asked for", "if not try_lock(self._file.fileno()):", "if False:"),
    ),
    *of(
        "storage/draws.py",
        (
            FLIPPED,
            f"{DRAWS}::test_draws_that_have_changed_places_are_refused",
            f"{DRAWS}::test_what_is_corrupt_after_the_checkpoint_is_drawn_again",
        ),
        ("draws: not checked", "    if check:\n", "    if False:\n"),
        ("draws: not checked by a resumed run", "_check_draws(self.path, values, digests[: self.count])", "pass"),
        ("draws: those after the checkpoint are checked", "digests[: self.count])", "digests)"),
        ("draws: the header is not in the digest", "count + _digest(self._header, count)", "count + _digest(count)"),
        ("draws: a draw's number is not in its digest", 'return _digest(struct.pack("<q", number), *rows)', "return _digest(*rows)"),
    ),
    *of(
        "storage/draws.py",
        (f"{DRAWS}::test_a_truncated_file_is_refused", f"{DRAWS}::test_a_file_of_other_draws_is_not_gone_on_with"),
        ("draws: a file of another size", "or os.fstat(self._file.fileno()).st_size != size", ""),
        ("draws: a file with another header", "!= self._header or", "is None or"),
    ),
    *of(
        "storage/draws.py",
        f"{RESUME}::test_a_checkpoint_beside_fewer_draws_than_it_was_written_after_is_refused",
        ("draws: fewer than the checkpoint's", "if len(digests) < self.count:", "if False:"),
    ),
    *of(
        "storage/draws.py",
        f"{DRAWS}::test_a_file_that_was_taken_away_meanwhile_is_missed_at_the_next_flush",
        ("draws: a file that was taken away", "or not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))", ""),
    ),
    *of(
        "storage/draws.py",
        f"{DRAWS}::test_a_write_that_is_cut_short_goes_on_where_it_stopped",
        ("draws: the rest is written where the first part is", "data, at = data[done:], at + done", "data, at = data[done:], at"),
    ),
    *of(
        "storage/draws.py",
        f"{DRAWS}::test_room_for_all_draws_is_reserved_before_the_first",
        ("draws: no room is reserved", "os.posix_fallocate(file, 0, size)", "os.truncate(file, size)"),
    ),
    *of(
        "storage/files.py",
        DAMAGED,
        (
            "hostile: the digest of a checkpoint is computed and ignored",
            'raise ValueError("its digest is not that of its content")',
            "pass",
        ),
        (
            "hostile: errors of the library come through",
            "except (SafetensorError, LookupError, StopIteration, TypeError, ",
            "except (LookupError, ",
        ),
    ),
    *of(
        "storage/draws.py",
        DAMAGED,
        ("hostile: draws of a wrong digest are read", "_check_draws(Path(path), values, digests)", "pass"),
    ),
    *of(
        "storage/files.py",
        KILLED,
        (
            "kill: a checkpoint is written in its place",
            "            os.replace(part, path)",
            "            part.rename(path.with_name('x'))",
        ),
    ),
    *of(
        "infer/distill/training.py",
        KILLED,
        (
            "kill: the average of the parameters starts anew",
            "                kept.copy_(value)\n        self.steps",
            "                pass\n        self.steps",
        ),
        ("kill: moments of Adam start anew", '{int(place): value for place, value in kept["state"].items()}', "{}"),
    ),
    *of(
        "infer/distill/apd.py",
        KILLED,
        ("kill: training goes on with other random numbers", 'files.set_random_state(content["random"], rows.device)', "pass"),
    ),
    *of(
        "infer/active.py",
        KILLED,
        ("kill: rounds start from other random numbers", 'files.set_random_state(content["random"]', '(lambda *_: None)(content["random"]'),
    ),
    *of(
        "checked.py",
        FIVE_HUNDRED,
        ("fuzz: nothing is checked", "        if wrong is None:\n", "        if True:\n"),
        ("fuzz: names of arguments are not told", 'return ValueError(f"{given}: {_words(hint)} is needed")', 'return ValueError("wrong")'),
        (
            "fuzz: a flag may be anything",
            "return isinstance(value, (bool, np.bool_)) or (isinstance(value, int) and value in (0, 1))",
            "return True",
        ),
    ),
    *of(
        "checked.py",
        "test_checked.py",
        ("checked: a number may be NaN", "and math.isfinite(value)", ""),
        ("checked: True is a count", "(int, np.integer)) and not isinstance(value, bool)", "(int, np.integer))"),
        ("checked: numbers of another kind stay", "                given |= numbers\n", ""),
        ("checked: any error of a large count is one of memory", "if short and counts else None", "if counts else None"),
    ),
    *of(
        "storage/files.py",
        HELD,
        ("lock: let go at the first checkpoint", "before = None if held is None else held.take(part)", "before = None"),
    ),
    *of(
        "infer/mcmc/state.py",
        NAMED,
        ("state: any value", "        _check(self)\n", ""),
        ("state: any type", "            if not _is_of(new, hints[name]):", "            if False:"),
        ("state: another rule's variables", "_forms(new) != _forms(old)", "False"),
    ),
    *of(
        "infer/distill/training.py",
        NAMED,
        ("Adam: any settings", "if type(group[name]) is not type(own[name]) or group[name] != own[name]:", "if False:"),
        ("Adam: negative squares", ' or (name == "exp_avg_sq" and bool((value < 0).any()))', ""),
    ),
    *of(
        "infer/autoguide/stored.py",
        NAMED,
        ("guide: sites of one name", "if site.name in {each.name for each in sites}:", "if False:"),
        ("guide: sites that overlap", "if type(site.start) is not int or site.start != start:", "if type(site.start) is not int:"),
        ("guide: a map onto another shape", "or torch.Size(transform.inverse_shape(shape)) != flat:", ":"),
    ),
]
