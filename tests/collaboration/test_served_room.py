"""The server of a collaboration, over ASGI in this process: rounds, restarts, absentees, refusals, bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")

from safetensors.torch import save

from kilobayes.adapters import LoRA, LoRAXS, VBLoRA
from kilobayes.collaboration import rounds
from kilobayes.collaboration.scheme import Scheme
from kilobayes.federated import wire
from kilobayes.federated.ledger import Ledger
from kilobayes.testing.tiny import tiny_model

from .group import USERS, Group, Make, averaged


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    monkeypatch.setattr("kilobayes.federated.app.PATIENCE", 0.05)
    with ExitStack() as stack:

        def made(folder: str = "server", adapter: Any = None, largest: int = 1 << 20, **given: Any) -> Group:
            group = Group(tmp_path / folder, tiny_model(adapter or LoRAXS(r=3)), largest, **given)
            stack.enter_context(group.client)
            return group

        yield made


def test_everyone_gets_the_average_of_all_by_numbers_of_rows(make: Make) -> None:
    group = make()
    group.join(*USERS)
    assert group.ask("anna", "/rounds/0/mixed").json()["round"] == 0  # not yet
    assert [group.send(user, 0).status_code for user in USERS] == [200, 200, 200]
    expected = averaged(group, USERS, [0.3, 0.1, 0.6])
    for user in USERS:
        torch.testing.assert_close(group.mixed(user, 0), expected)
        assert group.ask(user, "/status").json()["latest"] == 0
    (line,) = group.records()
    assert line["trust"] == [[0.3, 0.1, 0.6]] * 3
    assert (line["step"], line["users"], line["refused"]) == (4, USERS, {})
    whole = len(wire.pack_update(group.theta["anna"], None)), len(wire.pack(expected))
    assert (line["up_bytes"], line["down_bytes"]) == ([whole[0]] * 3, [whole[1]] * 3)
    assert "3 users" in group.lines[0]
    assert group.send("anna", 0).status_code == 409  # the next is open


def test_a_server_that_ends_anywhere_goes_on_from_there(make: Make) -> None:
    whole = make("whole", scheme=Scheme("validation"))
    broken = make("broken", scheme=Scheme("validation"))
    losses = torch.tensor([[0.1, 0.2, 0.9], [0.3, 0.1, 0.5], [0.9, 0.9, 0.2]], dtype=torch.float64)

    def score(group: Group, user: str, at: int) -> None:
        own = losses[USERS.index(user)][None]
        assert group.ask(user, f"/rounds/{at}/losses", content=wire.pack({"losses": own})).status_code == 200

    whole.join(*USERS)
    broken.join(*USERS)
    for at in (0, 1):
        for user in USERS:
            whole.send(user, at)
            broken.send(user, at)
            broken = make("broken", scheme=Scheme("validation"))
        found = wire.unpack_everyone(broken.ask("ben", f"/rounds/{at}/updates").content, USERS)
        key = next(iter(found))
        torch.testing.assert_close(found[key], torch.cat([whole.theta[user][key] for user in USERS]))
        for user in USERS:
            score(whole, user, at)
            score(broken, user, at)
            broken = make("broken", scheme=Scheme("validation"))
    assert whole.room.over
    assert broken.room.over
    assert whole.records() == broken.records()
    for user in USERS:
        torch.testing.assert_close(whole.mixed(user, 1), broken.mixed(user, 1), rtol=0, atol=0)
    trust = torch.tensor(whole.records()[0]["trust"])
    expected = torch.tensor([30.0, 10, 60]) * (-losses.float() / 0.1).exp()
    torch.testing.assert_close(trust, expected / expected.sum(dim=1, keepdim=True))


def test_a_kill_between_mixing_and_the_next_round_is_done_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = make()
    group.join(*USERS)
    for user in USERS[:2]:
        group.send(user, 0)

    def killed(self: Ledger, state: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "save", killed)
        assert group.send("cara", 0).status_code == 500
    assert len(group.records()) == 1
    again = make()
    assert again.room.state.round == 1
    assert len(again.records()) == 1
    torch.testing.assert_close(again.mixed("ben", 0), averaged(again, USERS, [0.3, 0.1, 0.6]))


def test_absentees_keep_theirs_and_are_in_the_next_round(make: Make) -> None:
    group = make(wait=0.2)
    group.join(*USERS)
    group.send("anna", 0)
    group.send("ben", 0)
    expected = averaged(group, ["anna", "ben"], [0.75, 0.25])
    group.closed()
    torch.testing.assert_close(group.mixed("ben", 0), expected)
    assert group.ask("cara", "/rounds/0/mixed").status_code == 204
    assert group.ask("cara", "/status").json() == {
        "round": 1, "phase": "updates", "present": [], "latest": None, "over": False
    }  # fmt: skip
    (line,) = group.records()
    assert line["trust"] == [[0.75, 0.25, 0.0], [0.75, 0.25, 0.0], [0.0, 0.0, 1.0]]
    assert line["refused"] == {"cara": "absent"}
    for user in USERS:
        group.send(user, 1)
    torch.testing.assert_close(group.mixed("cara", 1), averaged(group, USERS, [0.3, 0.1, 0.6]))
    torch.testing.assert_close(make().mixed("cara", 1), group.mixed("cara", 1))  # who comes back much later


def test_a_round_of_too_few_is_skipped_and_logged(make: Make) -> None:
    group = make(wait=0.2, least=2)
    group.join("anna")
    group.send("anna", 0)
    group.closed()
    assert group.ask("anna", "/rounds/0/mixed").status_code == 204
    (line,) = group.records()
    assert line["skipped"] == "1 of at least 2 users"
    assert "skipped" in group.lines[0]
    assert line["up_bytes"][0] > 0
    assert line["up_bytes"][1:] + line["down_bytes"] == [0] * 5
    assert line["trust"] == torch.eye(3).tolist()


def test_who_does_not_say_losses_in_time_is_absent(make: Make) -> None:
    group = make(wait=0.3, scheme=Scheme("validation", temperature=1e9))
    group.join(*USERS)
    for user in USERS:
        group.send(user, 0)
    for user in ("anna", "ben"):
        own = torch.zeros(1, 3, dtype=torch.float64)
        assert group.ask(user, "/rounds/0/losses", content=wire.pack({"losses": own})).status_code == 200
    group.closed()
    torch.testing.assert_close(group.mixed("anna", 0), averaged(group, ["anna", "ben"], [0.75, 0.25]))
    assert group.records()[0]["refused"] == {"cara": "no losses"}


def test_predictions_decide_whom_one_trusts(make: Make) -> None:
    group = make(scheme=Scheme("predictions", temperature=0.01))
    group.join(*USERS)
    same = torch.tensor([[[0.9, 0.1]]]).log().half()
    other = torch.tensor([[[0.1, 0.9]]]).log().half()
    assert group.send("anna", 0).status_code == 422  # none
    for user, own in zip(USERS, (same, same, other), strict=True):
        assert group.send(user, 0, predictions=own).status_code == 200
    trust = torch.tensor(group.records()[0]["trust"])
    torch.testing.assert_close(trust[2], torch.tensor([0.0, 0.0, 1.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(trust[0], torch.tensor([0.75, 0.25, 0.0]), atol=1e-6, rtol=0)


def test_what_cannot_be_mixed_is_refused_before_it_is_kept(make: Make) -> None:
    group = make(largest=100_000)
    group.join(*USERS)
    good = group.theta["anna"]
    key = next(iter(good))
    bad = {
        "holds what is no number": good | {key: good[key] * float("nan")},
        "above 1e+06": good | {key: good[key] + 1e7},
        "not (1, ": good | {key: torch.zeros(1, 2)},
        "missing": {k: v for k, v in good.items() if k != key},
        "not asked for": good | {"more": torch.zeros(1)},
        "no float32 leaf": good | {key: good[key].double()},
        "floating-point": good | {key: torch.zeros(1, 2, dtype=torch.int64)},
    }
    for said, theta in bad.items():
        answer = group.send("anna", 0, theta)
        assert (answer.status_code, said in answer.json()["error"]) == (422, True), said
    whole = wire.pack_update(good, None)
    for body in (b"", b"rubbish" * 10, whole[:-4], whole[:20], (1 << 62).to_bytes(8, "little") + whole[8:]):
        assert group.ask("anna", "/rounds/0/update", content=body).status_code == 422
    assert group.ask("anna", "/rounds/0/update", content=save({"x": torch.zeros(30_000)})).status_code == 413
    assert group.ask("anna", "/rounds/0/losses", content=whole).status_code == 409
    assert group.send("anna", 5).status_code == 409
    assert group.ask("anna", "/rounds/x/mixed").status_code == 422
    assert group.send("anna", 0, predictions=torch.zeros(1, 2, 2)).status_code == 422  # unasked
    assert not list(group.folder.glob("users/*"))
    hello = {"rows": 3, "fingerprint": "f", "reference": ""}
    for odd in ({"fingerprint": "g"}, {"rows": 0}, {"rows": True}, {"rows": "3"}, {"reference": "x"}):
        assert group.ask("anna", "/join", json=hello | odd).status_code == 422
    assert group.ask("anna", "/join", content=b"[" * 90_000).status_code == 422


def test_an_average_that_fails_skips_its_round_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    group = make(adapter=LoRA(r=2), average="auto")
    group.join(*USERS)
    with monkeypatch.context() as patch:
        patch.setattr("kilobayes.federated.closing.EXCESSIVE", 1e39)
        for user in USERS:
            huge = {k: torch.full_like(v, 3.4e38) for k, v in group.theta[user].items()}
            assert group.send(user, 0, huge).status_code == 200
    assert group.records()[0]["skipped"].startswith(("the updates cannot", "the mixtures are not finite"))
    for user in USERS:
        group.send(user, 1)
    assert group.mixed("ben", 1).keys() == group.theta["ben"].keys()
    assert "trust" in group.records()[1]


@pytest.mark.parametrize("user", ["anna", "nobody", ""])
@pytest.mark.parametrize("token", ["", "Bearer ", "Bearer token of ben", "Bearer \xff", "token of anna "])
def test_strangers_are_told_nothing(make: Make, user: str, token: str) -> None:
    group = make()
    headers = {"kilobayes-user": user, "authorization": token.encode("latin-1")}
    for path in ("/v1/settings", "/v1/status", "/", "/docs", "/v1/rounds/0/mixed"):
        answer = group.client.get(path, headers=headers)
        assert answer.status_code == 401
        assert list(answer.json()) == ["error"]
    assert group.client.post("/v1/join", headers=headers, content=b"x" * 2_000_000).status_code == 401


def test_bytes_of_a_round_by_adapter(make: Make) -> None:
    """What is reported is what is sent: numbers of 4 bytes, and names and shapes of a safetensors header."""
    sizes = {}
    for adapter in (LoRA(r=4), LoRAXS(r=4), VBLoRA(h=8)):
        group = make(type(adapter).__name__, adapter)
        group.join(*USERS)
        for user in USERS:
            group.send(user, 0)
        numbers = rounds.bytes_of(group.theta["anna"])
        (line,) = group.records()
        up, down = line["up_bytes"][0], line["down_bytes"][0]
        header = 8 + 130 * len(group.theta["anna"])
        assert numbers < up < numbers + header
        assert numbers < down < numbers + header
        sizes[type(adapter).__name__] = up
    assert sizes["LoRAXS"] < sizes["LoRA"]
