"""cluster/aws.yaml, by Ray's autoscaler, Ray's command line and botocore's model of EC2."""

import copy
import shlex
from typing import Any

import botocore.session
import botocore.validate
import click
import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli as ray_cli

from tests.support.manifests import CLUSTER, Tree, edited, image_problems, load


def aws() -> Tree:
    (config,) = load(CLUSTER / "aws.yaml")
    return config


def check_aws(config: Tree) -> Tree:
    """What `ray up` makes of it before it calls AWS, and what EC2 would say to each kind of machine."""
    prepared: Tree = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    shape = (
        botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    )
    for name, node in prepared["available_node_types"].items():
        machine = dict(node["node_config"], MinCount=1, MaxCount=1)
        del machine["SubnetIds"]  # Ray's own: it chooses one
        report = botocore.validate.ParamValidator().validate(machine, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        assert machine["SecurityGroupIds"], f"{name}: Ray would make a group that lets the world try SSH"
        assert machine["IamInstanceProfile"], f"{name}: no access to S3"
        is_spot = machine.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert is_spot == (name != prepared["head_node_type"])
    for command in [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]:
        program, verb, *arguments = shlex.split(command)
        assert program == "ray"
        options = ray_cli.commands[verb].make_context(verb, arguments).params
        assert options.get("dashboard_host") in (None, "127.0.0.1"), "the dashboard is open"
    return prepared


def test_ray_up_takes_the_aws_file() -> None:
    prepared = check_aws(aws())
    assert prepared["setup_commands"] == []  # else Ray's example, which installs another Ray
    assert prepared["available_node_types"]["gpu"]["min_workers"] == 0
    assert prepared["available_node_types"]["gpu"]["resources"]["GPU"] == 1
    assert list(image_problems(prepared["docker"]["image"].rpartition("/")[2])) == []
    assert "~/.ray/auth_token" in prepared["file_mounts"]


@pytest.mark.parametrize(
    ("path", "value", "error"),
    [
        ("max_worker", 3, jsonschema.ValidationError),
        ("available_node_types/gpu/resources/GPU", "1", jsonschema.ValidationError),
        ("available_node_types/gpu/node_config", None, jsonschema.ValidationError),
        ("head_node_type", "heads", ValueError),
        ("max_workers", 0, ValueError),
        ("available_node_types/gpu/node_config/InstanceTyp", "g6e.2xlarge", AssertionError),
        ("available_node_types/cpu/node_config/BlockDeviceMappings/0/Ebs/VolumeSize", "big", AssertionError),
        ("available_node_types/cpu/node_config/InstanceMarketOptions", None, AssertionError),
        ("available_node_types/head/node_config/SecurityGroupIds", [], AssertionError),
        ("head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0", AssertionError),
        ("worker_start_ray_commands/1", "ray start --adress=HEAD:6379", click.NoSuchOption),
    ],
)
def test_a_broken_aws_file_is_refused(path: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_aws(edited(aws(), path, value))
