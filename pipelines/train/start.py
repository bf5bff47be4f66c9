"""What a run takes from the checkpoint that it starts from, before it starts."""

import json
from collections.abc import Sequence
from typing import Any

from ctmsr.config import check, from_dict, to_dict
from ctmsr.errors import CheckpointError, ConfigError, DataError
from ctmsr.model.checkpoint import MANIFEST_FILE, check_format
from ctmsr.model.network import NetworkConfig, described
from ctmsr.training.transfer import Transfer, plan_transfer

from ..config.run_config import RunConfig
from ..infra.checkpoints import checkpoint_uri
from ..infra.progress import counted
from ..infra.storage import open_uri, read_bytes

_LEAST_SHARE = 0.5
"""Of a network's weights, to come from the checkpoint: below it, `init_uri` or `network.*` is a mistake."""
_MOST_NAMES = 4


def starting_point(config: RunConfig) -> str:
    """One to four lines: which weights `config.init_uri` gives the network, which begin anew, which are left.

    Raises:
        CheckpointError: There is no checkpoint.
        ConfigError: Its network has little in common with that of the config.
    """
    before = _network_of(config.init_uri)
    plan = plan_transfer(described(before), described(config.network))
    old, new = to_dict(before), to_dict(config.network)
    changed = [f"{key}: {old[key]} -> {new[key]}" for key in new if old[key] != new[key] and key != "dropout"]
    check(
        plan.share >= _LEAST_SHARE,
        f"init_uri {config.init_uri} is of another network ({', '.join(changed)}): it has {plan.share:.0%} "
        f"of the weights, and at least {_LEAST_SHARE:.0%} are needed. Set network.* nearer to it.",
    )
    return _report(config.init_uri, plan)


def _network_of(uri: str) -> NetworkConfig:
    file_system, path = open_uri(f"{checkpoint_uri(uri)}/{MANIFEST_FILE}")
    try:
        manifest: dict[str, Any] = json.loads(read_bytes(file_system, path))
        check_format(uri, manifest)
        return from_dict(NetworkConfig, manifest["config"]["network"], "network")
    except (DataError, ConfigError, ValueError, KeyError) as error:
        raise CheckpointError(f"init_uri {uri} is not a checkpoint: {error}") from error


def _report(uri: str, plan: Transfer) -> str:
    used = len(plan.loaded) + len(plan.resampled)
    total = used + len(plan.anew)
    lines = [f"init_uri {uri}: {used} of {total} tensors, {plan.share:.1%} of the weights, are loaded"]
    for what, names in (
        ("resampled for another scale", list(plan.resampled)),
        ("initialised anew", plan.anew),
        ("left in the checkpoint", plan.left),
    ):
        if names:
            lines.append(f"  {what}: {_modules(names)}")
    return "\n".join(lines)


def _modules(names: Sequence[str]) -> str:
    """The larger modules that parameters belong to, in order, a few of them by name."""
    modules = list(dict.fromkeys(".".join(name.split(".")[1:-1][:2]) for name in names))
    more = f" and {len(modules) - _MOST_NAMES} more" if len(modules) > _MOST_NAMES else ""
    return f"{', '.join(modules[:_MOST_NAMES])}{more} ({counted(len(names), 'tensor')})"
