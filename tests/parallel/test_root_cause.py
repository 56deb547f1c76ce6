"""Who is at fault, and who says so. Real processes that die and hang are in tests/faults."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from accessory.errors import AccessoryError, DataError, LostRankError, OutOfMemoryError
from accessory.parallel import root_cause
from accessory.parallel.root_cause import Witness

GLOO = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:2. More"
)


@pytest.fixture
def witnesses(monkeypatch: pytest.MonkeyPatch) -> list[Witness]:
    """Of three ranks, that have little patience."""
    monkeypatch.setattr(root_cause, "GRACE", 0.5)
    monkeypatch.setattr(root_cause, "_end_sibling", lambda *_: None)  # all of them are this process
    store = dist.HashStore()
    return [Witness(store, rank, 3) for rank in range(3)]


def settled(witnesses: list[Witness], errors: dict[int, Exception]) -> dict[int, AccessoryError]:
    """What the ranks in `errors` report, all at once."""
    found: dict[int, AccessoryError] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: found.update({rank: witnesses[rank].root_cause(errors[rank])}))
        for rank in errors
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def speakers(found: dict[int, AccessoryError]) -> list[int]:
    """Ranks that print."""
    return [rank for rank in found if found[rank].prints]


def test_the_error_of_one_rank_is_what_all_report(witnesses: list[Witness]) -> None:
    found = settled(witnesses, {0: GLOO, 1: DataError("line 3"), 2: GLOO})
    assert speakers(found) == [1]
    assert all(type(error) is DataError and str(error) == "[rank 1] line 3" for error in found.values())
    assert {error.status for error in found.values()} == {3}


def test_what_nobody_foresaw_comes_with_its_place(witnesses: list[Witness], capsys) -> None:
    try:
        raise KeyError("a")
    except KeyError as error:
        found = settled(witnesses, {0: GLOO, 2: error})
    assert speakers(found) == [2] and str(found[0]) == "[rank 2] KeyError: 'a'" and found[0].status == 1
    assert 'raise KeyError("a")' in capsys.readouterr().err


def test_memory_of_nccl_that_runs_out_is_no_lost_rank(witnesses: list[Witness]) -> None:
    error = dist.DistBackendError("NCCL error: unhandled cuda error.\nCuda failure 2 'out of memory'")
    found = settled(witnesses, {0: GLOO, 1: error})
    assert speakers(found) == [1] and type(found[0]) is OutOfMemoryError
    assert str(found[0]) == "[rank 1] Memory ran out: NCCL error: unhandled cuda error."


def test_of_two_errors_the_first_is_told(witnesses: list[Witness]) -> None:
    found = settled(witnesses, {0: DataError("a"), 1: DataError("b"), 2: GLOO})
    assert len(speakers(found)) == 1
    assert str(found[2]) == str(found[speakers(found)[0]])


def test_ranks_that_do_not_answer_are_named(witnesses: list[Witness]) -> None:
    found = settled(witnesses, {1: GLOO, 2: GLOO})
    assert len(speakers(found)) == 1 and type(found[2]) is LostRankError
    assert str(found[2]).startswith("rank 0 (process ")
    assert str(found[2]).endswith(" no longer answers: killed, or hanging (Connection closed by peer [::1]:2).")


def test_when_all_answer_they_wait_for_one_another(witnesses: list[Witness]) -> None:
    found = settled(witnesses, dict.fromkeys(range(3), GLOO))
    assert len(speakers(found)) == 1 and "Every rank still runs, but they wait for one another in vain" in str(found[1])


def test_what_all_have_in_common_the_main_rank_says(witnesses: list[Witness]) -> None:
    errors = {rank: DataError("all") for rank in range(3)}
    for error in errors.values():
        error.common = True
    found = settled(witnesses, errors)
    assert speakers(found) == [0] and str(found[1]) == "all"


def test_a_store_that_is_stopped(witnesses: list[Witness], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 that hosts it may be what hangs. It is not waited for, neither with another's error nor with one's own."""
    monkeypatch.setattr(root_cause, "_PATIENCE", 0.2)

    class Stopped:
        def __getattr__(self, name: str):
            return lambda *_: threading.Event().wait()

    for rank in (1, 2):
        witnesses[rank].store = Stopped()
    monkeypatch.setattr(Witness, "answer", lambda self: None)  # which does not wait for a reply
    found = settled(witnesses, {1: GLOO, 2: DataError("line 3")})
    assert type(found[1]) is LostRankError and "is gone, or stopped" in str(found[1]) and found[1].prints
    assert str(found[2]) == "[rank 2] line 3" and found[2].prints


def test_a_store_that_is_gone(witnesses: list[Witness], monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getattr__(self, name: str):
            raise dist.DistNetworkError("connection refused")

    witnesses[1].store = Gone()
    found = settled(witnesses, {1: GLOO})
    assert "the process that the others met at is gone" in str(found[1]) and found[1].prints
