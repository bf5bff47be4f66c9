"""LPIPS: the known answers, its gradients, and what it refuses to load."""

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctmsr.errors import UserError
from ctmsr.image.ranges import to_tensor
from ctmsr.metrics.backbone_cache import backbone_path
from ctmsr.metrics.perceptual import Lpips, load_lpips, lpips_tensors
from tests.support.torchvision import make_importable


@pytest.fixture(scope="module")
def vgg() -> Lpips:
    return load_lpips("vgg")


def random_pair(*, num_images: int = 1, size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, num_images, 3, size, size, generator=generator) * 2 - 1
    return a, b


def test_vgg_gives_the_known_answers(vgg: Lpips) -> None:
    draws = np.random.RandomState(123).rand(2, 10, 3, 100, 100).astype(np.float32)
    a, b = torch.from_numpy(draws * 2 - 1)
    known = [0.3497, 0.3494, 0.3473, 0.3558, 0.3437, 0.3366, 0.3716, 0.3516, 0.3472, 0.3413]
    with torch.no_grad():
        torch.testing.assert_close(vgg(a, b), torch.tensor(known), atol=5e-5, rtol=0)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_equal_images_are_at_distance_zero_and_others_are_not(net: str) -> None:
    lpips = load_lpips(net)  # type: ignore[arg-type]
    a, b = random_pair(num_images=2)
    b[0] = a[0]
    distance = lpips(a, b)
    assert distance[0] == 0
    assert distance[1] > 0.01


def test_the_gradient_reaches_the_image_and_no_weight(vgg: Lpips) -> None:
    a, b = random_pair()
    a.requires_grad_()
    vgg(a, b).sum().backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert a.grad.abs().sum() > 0
    assert not any(weight.requires_grad for weight in vgg.parameters())


def test_a_step_against_the_gradient_brings_the_images_closer(vgg: Lpips) -> None:
    a, b = random_pair()
    a.requires_grad_()
    before = vgg(a, b)
    (gradient,) = torch.autograd.grad(before, a)
    assert vgg(a.detach() - 0.1 * gradient / gradient.norm(), b) < before


def of_the_package(net: str, a: Tensor, b: Tensor) -> Tensor:
    """The distance as the package computes it, on our backbone."""
    make_importable()
    import lpips as package

    reference = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    backbone = load_file(backbone_path(net))  # type: ignore[arg-type]
    # lpips cuts the backbone into slices: `slice2.5.weight` is torchvision's `features.5.weight`.
    names = {name: f"features.{name.split('.', 1)[1]}" for name in reference.net.state_dict()}
    reference.net.load_state_dict({name: backbone[source] for name, source in names.items()})
    return reference(a, b).flatten()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_it_is_the_package_s_distance_and_anchored_too(net: str) -> None:
    lpips = load_lpips(net)  # type: ignore[arg-type]
    a, b = random_pair(num_images=2, size=64)
    a.requires_grad_()
    expected = of_the_package(net, a, b)
    (gradient,) = torch.autograd.grad(2 * expected.sum(), a)
    torch.testing.assert_close(lpips(a, b), expected, rtol=1e-6, atol=0)
    anchored = lpips.anchored(a)
    first, second = anchored(a, b), anchored(a, b)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=0)
    assert torch.equal(second, first)
    torch.testing.assert_close(torch.autograd.grad(first.sum() + second.sum(), a)[0], gradient)


def photograph() -> Tensor:
    """(1, 3, 128, 128) of a real one."""
    return to_tensor(skimage.data.astronaut()[None, 30:158, 150:278])


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.2])
def test_bf16_moves_the_distance_and_its_gradient_by_little(noise: float) -> None:
    a = photograph()
    b = a + noise * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for precision in ("fp32", "bf16"):
        lpips = load_lpips("vgg", precision)
        a.requires_grad_()
        distance = lpips(a, b)
        (gradient,) = torch.autograd.grad(distance, a)
        assert distance.dtype == gradient.dtype == torch.float32
        found.append((distance.item(), gradient.flatten()))
    (exact, gradient), (rounded, coarse) = found
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.005)
    assert torch.cosine_similarity(coarse, gradient, dim=0) > 0.97
    assert coarse.norm() == pytest.approx(gradient.norm().item(), rel=0.03)


def test_a_float16_file_carries_it(tmp_path: Path) -> None:
    exact, tensors = load_lpips("alex"), lpips_tensors("alex")
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / "alex.safetensors")
    carried = Lpips(load_file(tmp_path / "alex.safetensors"))
    a, b = random_pair()
    torch.testing.assert_close(carried(a, b), exact(a, b), rtol=1e-3, atol=0)


def test_where_all_channels_are_zero_the_gradient_is_finite() -> None:
    silent = {name: torch.zeros_like(value) for name, value in lpips_tensors("alex").items()}
    a, b = random_pair()
    a.requires_grad_()
    Lpips(silent)(a, b).sum().backward()
    assert a.grad is not None
    assert not a.grad.any()


def test_train_mode_and_autocast_change_nothing(vgg: Lpips) -> None:
    a, b = random_pair()
    expected = vgg(a, b)
    parent = torch.nn.ModuleList([vgg]).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(parent[0](a, b), expected)


def test_loading_is_quiet_and_leaves_the_random_state(capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_lpips("alex")
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_a_missing_backbone_names_its_path_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTMSR_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"lpips/vgg.safetensors is missing.*python -m pipelines.backbones"):
        load_lpips("vgg")


def test_a_backbone_with_one_wrong_byte_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = backbone_path("alex")
    monkeypatch.setenv("CTMSR_CACHE", str(tmp_path))
    damaged = backbone_path("alex")
    damaged.parent.mkdir()
    shutil.copy(original, damaged)
    with damaged.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match=r"alex.safetensors is damaged: sha256 .*pipelines.backbones"):
        load_lpips("alex")


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTMSR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert backbone_path("vgg") == tmp_path / ".cache/ctmsr/lpips/vgg.safetensors"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert backbone_path("vgg") == tmp_path / "xdg/ctmsr/lpips/vgg.safetensors"
    monkeypatch.setenv("CTMSR_CACHE", str(tmp_path / "own"))
    assert backbone_path("vgg") == tmp_path / "own/lpips/vgg.safetensors"
