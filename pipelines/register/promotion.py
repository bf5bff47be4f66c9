"""Which version is the champion: a rule, a record on every version, and a loop that many processes may run.

MLflow can set an alias but not compare-and-set it, so it must not matter which process promotes. A version is
created last of all, complete and proven, in one transaction with its record: its own scores and those of the
champion at that moment, on the same pictures. Its number is then its place in an order that is the same for
every process, and nothing that comes later changes what was before it. `pending` derives from the versions of
a registry what is still to be written, and every registering process applies that until nothing is left
(`settle`):

- A version without a decision is compared with the last version below it that was promoted and not rolled
  back. Every process that computes this gets the same result, and the decision is final: it is a tag of the
  version.
- The alias `champion` belongs to the highest version that was promoted and not rolled back, `challenger` to
  the highest that was refused.

A version that is worse than bicubic on its pictures is refused in any case, so a registry may hold nothing
but challengers; it then has no alias `champion`.

"Better by a margin" does not order versions: of two that both beat a third, neither may beat the other. So
the champion is not "the best version" but the outcome of a queue: in the order of their numbers, each version
faces the champion it finds, and of two that are registered at once the second has to beat the first. As a
consequence losses add up: every promotion may lose the guard margin again.

A process that is killed leaves either the old champion or one that the rule promoted; the next registration
or rollback finishes its work. The next one also undoes an alias that was moved by hand: use `--rollback`
instead. A champion from before the gate existed counts as promoted.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ctmsr.errors import TrackingError
from ctmsr.metrics.scoring import METRICS, REFERENCE_METRICS

from ..config.run_config import RegisterConfig
from ..tracking.models import check_format
from ..tracking.runs import answered, connect, tracking_errors

CHAMPION, CHALLENGER = "champion", "challenger"
PROMOTED, REFUSED = "promoted", "refused"
RULE, DECISION, ROLLED_BACK = "gate.rule", "gate.decision", "gate.rolled_back"
_RULE_FIELDS = ("metric", "margin", "guard", "guard_margin")
RISES = {name: METRICS[name].rises for name in REFERENCE_METRICS}
"""Whether a higher score is better."""


@dataclass(frozen=True)
class Measured:
    """The scores of a version, and of the champion at that moment on the same pictures."""

    set_version: str
    """Hash of pictures, crops and degradation."""
    protocol: str
    """The same in words."""
    scores: Mapping[str, float]
    champion: int | None
    """None if there was no champion."""
    champion_scores: Mapping[str, float]
    bicubic_scores: Mapping[str, float]


@dataclass(frozen=True)
class Decision:
    """What became of a version."""

    version: str
    is_promoted: bool
    reason: str
    champion: str | None
    """The champion's version now; None if every version so far was refused."""


@dataclass(frozen=True)
class Write:
    """An alias to move to a version or, if `value` is set, a tag to set on it."""

    version: int
    name: str
    value: str | None = None

    def apply(self, client: MlflowClient, model_name: str) -> None:
        """Writes it."""
        if self.value is None:
            client.set_registered_model_alias(model_name, self.name, str(self.version))
        else:
            client.set_model_version_tag(model_name, str(self.version), self.name, self.value)

    def is_done(self, client: MlflowClient, model_name: str) -> bool:
        """Whether some process has written it, perhaps with another value."""
        version = client.get_model_version(model_name, str(self.version))
        return self.name in (version.aliases if self.value is None else version.tags)


def record(rule: RegisterConfig, measured: Measured | None) -> dict[str, str]:
    """The tags to create a version with."""
    tags = {RULE: json.dumps({name: getattr(rule, name) for name in _RULE_FIELDS})}
    if measured:
        tags |= {
            "gate.set_version": measured.set_version,
            "gate.protocol": measured.protocol,
            "gate.scores": json.dumps(dict(measured.scores)),
            "gate.champion": "" if measured.champion is None else str(measured.champion),
            "gate.champion_scores": json.dumps(dict(measured.champion_scores)),
            "gate.bicubic_scores": json.dumps(dict(measured.bicubic_scores)),
        }
    return tags


def pending(versions: Mapping[int, Mapping[str, str]], aliases: Mapping[str, int], now: str) -> list[Write]:
    """What remains to be written to a registry, in the order it must be written; empty once it is settled.

    Args:
        versions: Tags of every version, by its number.
        aliases: Version number by alias.
        now: Time to stamp decisions with.
    """
    writes: list[Write] = []
    latest: dict[str, int] = {}
    for number, tags in sorted(versions.items()):
        decision = tags.get(DECISION)
        if decision is None:
            if RULE in tags:
                champion = latest.get(CHAMPION)
                promoted, reason = verdict(tags, champion, versions[champion] if champion else {})
            elif aliases.get(CHAMPION) == number:
                promoted, reason = True, "it was the champion before the gate existed"
            else:  # not created by this project
                continue
            decision = PROMOTED if promoted else REFUSED
            writes += [Write(number, "gate.reason", reason), Write(number, "gate.decided_at", now)]
            writes.append(Write(number, DECISION, decision))
        if decision == REFUSED:
            latest[CHALLENGER] = number
        elif ROLLED_BACK not in tags:
            latest[CHAMPION] = number
    writes += [Write(number, alias) for alias, number in latest.items() if aliases.get(alias) != number]
    return writes


def verdict(
    tags: Mapping[str, str], champion: int | None, champion_tags: Mapping[str, str]
) -> tuple[bool, str]:
    """Whether a version with these tags takes the place of `champion`, and why.

    Compared with bicubic, `rule.metric` must not get worse, and `rule.guard` by `rule.guard_margin` at most;
    without a champion, that is enough. Compared with the champion, `rule.metric` must also gain at least
    `rule.margin`, and more than 0. A NaN score always fails. A version that was not measured can become
    champion if there is none: it exists only because it was loaded back and gave its checkpoint's bytes.
    """
    if "gate.scores" not in tags:
        if champion is None:
            return True, "there was no champion, and it was not measured"
        return False, f"it was not measured against version {champion}, the champion"
    rule, mine = json.loads(tags[RULE]), json.loads(tags["gate.scores"])
    if "gate.bicubic_scores" in tags:  # older versions were not compared with bicubic
        compared = _against_bicubic(rule, mine, json.loads(tags["gate.bicubic_scores"]))
        if champion is None or not compared[0]:
            return compared
    elif champion is None:
        return True, "there was no champion, and it was not measured against bicubic"
    if tags["gate.champion"] == str(champion):
        theirs = json.loads(tags["gate.champion_scores"])
    elif champion_tags.get("gate.set_version") == tags["gate.set_version"]:
        theirs = json.loads(champion_tags["gate.scores"])
    else:
        return False, (
            f"version {champion} became champion meanwhile, measured on other pictures "
            f"({champion_tags.get('gate.set_version', 'none')}, not {tags['gate.set_version']}). "
            "Register it again"
        )
    return _against_champion(rule, mine, theirs, champion)


def _against_bicubic(
    rule: Mapping[str, Any], mine: Mapping[str, float], bicubic: Mapping[str, float]
) -> tuple[bool, str]:
    gain, metric = _gain(rule["metric"], mine, bicubic)
    guard_gain, guard = _gain(rule["guard"], mine, bicubic)
    allowed = f"a loss of {-guard_gain:.4f}, {rule['guard_margin']:g} allowed"
    if not gain >= 0:
        return False, f"worse than bicubic: {metric}; {guard}"
    if not -guard_gain <= rule["guard_margin"]:
        return False, f"worse than bicubic: {guard}, {allowed}; {metric}"
    return True, f"there was no champion, and it is not worse than bicubic: {metric}; {guard}"


def _against_champion(
    rule: Mapping[str, Any], mine: Mapping[str, float], theirs: Mapping[str, float], champion: int
) -> tuple[bool, str]:
    gain, metric = _gain(rule["metric"], mine, theirs)
    guard_gain, guard = _gain(rule["guard"], mine, theirs)
    passes = gain >= rule["margin"] and gain > 0 and -guard_gain <= rule["guard_margin"]
    return passes, (
        f"{metric} of version {champion}: a gain of {gain:.4f}, {rule['margin']:g} needed; "
        f"{guard}: a loss of {-guard_gain:.4f}, {rule['guard_margin']:g} allowed"
    )


def _gain(metric: str, mine: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[float, str]:
    """By how much our score is better, and both scores in words."""
    ours, other = (scores.get(metric, math.nan) for scores in (mine, theirs))
    gain = ours - other if RISES[metric] else other - ours
    return gain, f"{metric} {ours:.4f} against {other:.4f}"


def settle(client: MlflowClient, model_name: str) -> dict[str, int]:
    """Decides what is undecided and moves the aliases; returns them, as version numbers.

    Reads the registry again after every round of writes, and returns once nothing is left to do. So of
    several processes doing this at once, the last to read leaves the registry as `pending` wants it, whatever
    the others have written.
    """
    while True:
        versions = _versions(client, model_name)
        aliases = _aliases(client, model_name)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        writes = pending(versions, aliases, now)
        if not writes:
            return aliases
        for write in writes:
            try:
                write.apply(client, model_name)
            except MlflowException:
                if not write.is_done(client, model_name):
                    raise
                break  # another process was first, and some databases reject the second write: read again


def decision_of(client: MlflowClient, model_name: str, version: str) -> Decision:
    """Settles the registry and returns the decision on a version."""
    aliases = settle(client, model_name)
    tags = answered(lambda: client.get_model_version(model_name, version)).tags
    champion = aliases.get(CHAMPION)
    return Decision(
        version,
        tags[DECISION] == PROMOTED,
        tags["gate.reason"],
        None if champion is None else str(champion),
    )


def rollback(tracking_uri: str, model_name: str) -> tuple[list[int], int]:
    """Gives the alias `champion` back to the version that had it before.

    The version that loses it is marked before the alias moves, and is never promoted again; its checkpoint
    can be registered again, as a new version.

    Returns:
        The versions rolled back, usually one, and the champion now.

    Raises:
        TrackingError: There is no champion, or none before it, and nothing has changed; or MLflow fails.
    """
    client = connect(tracking_uri)
    with tracking_errors(f"cannot roll back {model_name}"):
        seen = _aliases(client, model_name).get(CHAMPION)
        if seen is None:
            raise TrackingError(f"{model_name} has no champion to roll back. Register a model first.")
        settle(client, model_name)
        promoted = [
            number
            for number, tags in _versions(client, model_name).items()
            if tags.get(DECISION) == PROMOTED and ROLLED_BACK not in tags
        ]
        if not any(number < seen for number in promoted):
            raise TrackingError(
                f"version {seen} is the first champion of {model_name}; there is none to go back to. "
                "Register another version, or delete the alias to have no champion."
            )
        rolled_back = sorted((number for number in promoted if number >= seen), reverse=True)
        for number in rolled_back:  # those that users have not seen yet first
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            client.set_model_version_tag(model_name, str(number), ROLLED_BACK, now)
        return rolled_back or [seen], settle(client, model_name)[CHAMPION]


def _versions(client: MlflowClient, model_name: str) -> dict[int, dict[str, str]]:
    """Tags by version number.

    Raises:
        TrackingError: A newer release made one, which may follow other rules: nothing is decided.
    """
    search = partial(client.search_model_versions, f"name='{model_name}'", order_by=["version_number ASC"])
    found: dict[int, dict[str, str]] = {}
    token = None
    while True:
        page = answered(partial(search, page_token=token))
        for version in page:
            check_format(f"models:/{model_name}/{version.version}", version.tags)
            found[int(version.version)] = dict(version.tags)
        token = page.token
        if not token:
            return found


def _aliases(client: MlflowClient, model_name: str) -> dict[str, int]:
    aliases = answered(lambda: client.get_registered_model(model_name)).aliases
    return {alias: int(version) for alias, version in aliases.items()}
