import pytest
import torch

from lora_train.adapter import attach_adapter
from lora_train.config import LrSchedulerConfig, OptimConfig
from lora_train.model import load_base_model
from lora_train.optimizer import make_optimizer, make_scheduler, warmup_steps


@pytest.fixture
def model(make_config):
    config = make_config()
    return attach_adapter(load_base_model(config.model, torch.float32, torch.device("cpu")), config)


def rates(steps, **schedule):
    config = OptimConfig(lr=1.0, lr_scheduler=LrSchedulerConfig(**schedule))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    scheduler = make_scheduler(optimizer, config, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine():
    seen = rates(10, name="cosine", warmup_steps=4)
    assert seen[:4] == [0.25, 0.5, 0.75, 1.0]
    assert seen[4] == 1.0
    assert seen[-1] == pytest.approx(0.1)
    assert seen[4:] == sorted(seen[4:], reverse=True)


def test_cosine_to_zero():
    assert rates(5, name="cosine", warmup_steps=0, min_lr=0.0)[-1] == pytest.approx(0.0)


def test_linear_never_wastes_a_step():
    seen = rates(6, name="linear", warmup_steps=2)
    assert seen == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])


def test_constant():
    assert rates(4, name="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


def test_one_step():
    assert rates(1, name="cosine") == [1.0]


@pytest.mark.parametrize(("ratio", "steps", "expected"), [(0.03, 100, 3), (0.03, 10, 1), (0, 9, 0)])
def test_warmup_ratio(ratio, steps, expected):
    assert warmup_steps(LrSchedulerConfig(warmup_ratio=ratio), steps) == expected


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("ratio", [None, 16.0])
def test_every_trainable_parameter_once_and_it_moves(model, name, ratio):
    config = OptimConfig(name=name, lr=1e-2, weight_decay=0.1, loraplus_lr_ratio=ratio)
    optimizer = make_optimizer(model, config)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, trainable.values()))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            is_b = any("lora_B" in n for n, p in trainable.items() if p is parameter)
            assert group["lr"] == pytest.approx(1e-2 * (ratio or 1 if is_b else 1))
            assert group["weight_decay"] == 0.1
    before = {n: p.detach().clone() for n, p in trainable.items()}
    scheduler = make_scheduler(optimizer, config, 10)
    for parameter in trainable.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler.step()
    assert all(not torch.equal(p, before[n]) for n, p in trainable.items())


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_state_survives_saving(model, name, tmp_path):
    """Saved after two steps and loaded into a new optimizer, the third step is the same."""
    config = OptimConfig(name=name, lr=1e-2)
    trainable = [p for p in model.parameters() if p.requires_grad]

    def step(optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    optimizer = make_optimizer(model, config)
    step(optimizer, 0)
    step(optimizer, 1)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    weights = [p.detach().clone() for p in trainable]
    step(optimizer, 2)
    expected = [p.detach().clone() for p in trainable]
    with torch.no_grad():
        for parameter, weight in zip(trainable, weights, strict=True):
            parameter.copy_(weight)
    again = make_optimizer(model, config)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    step(again, 2)
    assert all(torch.equal(p, e) for p, e in zip(trainable, expected, strict=True))
