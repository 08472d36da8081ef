"""Modules in and out of flat vectors."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from tests.oracles import unrolled_gradient
from ufom_runtime import EXACT, BilevelProblem, FlatModule, hypergradient
from ufom_theory import UfomError

F64 = torch.float64


def net():
    torch.manual_seed(0)
    batch_statistics = nn.BatchNorm1d(4, track_running_stats=False)
    return nn.Sequential(nn.Linear(3, 4), batch_statistics, nn.Tanh(), nn.Linear(4, 1)).double()


def draw(n, generator):
    return tuple(torch.randn(n, 6, k, generator=generator, dtype=F64) for k in (3, 1, 3, 1))


TASKS = draw(3, torch.Generator().manual_seed(0))


def maml(flat, start=lambda theta, task: theta):
    return BilevelProblem(
        lambda theta, phi, task: mse_loss(flat(phi, task[0]), task[1]),
        lambda theta, phi, task: mse_loss(flat(phi, task[2]), task[3]),
        start,
        [0.1, 0.2, 0.1],
        draw,
    )


def plain_maml(module, names):
    """d/d(named parameters) of the mean outer loss after inner SGD on them, the module called by plain attributes."""
    own = dict(module.named_parameters(remove_duplicate=False))
    theta = [own[name].detach().clone().requires_grad_() for name in names]

    def call(values, x):
        def swap(tensors):
            for name, tensor in zip(names, tensors, strict=True):
                *path, last = name.split(".")
                module.get_submodule(".".join(path))._parameters[last] = tensor

        swap(values)
        try:
            return module(x)
        finally:
            swap([own[name] for name in names])

    total = 0.0
    for x, y, xq, yq in zip(*TASKS, strict=True):
        phi = theta
        for alpha in (0.1, 0.2, 0.1):
            slopes = torch.autograd.grad(mse_loss(call(phi, x), y), phi, create_graph=True)
            phi = [p - alpha * g for p, g in zip(phi, slopes, strict=True)]
        total = total + mse_loss(call(phi, xq), yq) / len(TASKS[0])
    return torch.cat([g.flatten() for g in torch.autograd.grad(total, theta)])


def check_against_plain(module, names, flat):
    for chunk in (None, 1):
        found = hypergradient(maml(flat), flat.vector(), TASKS, EXACT, chunk=chunk)
        torch.testing.assert_close(found, plain_maml(module, names), rtol=1e-10, atol=1e-12)


def test_call_is_the_modules_own():
    module = net()
    flat = FlatModule(module)
    x = torch.randn(5, 3, dtype=F64)
    torch.testing.assert_close(flat(flat.vector(), x), module(x))
    assert flat.vector().shape == (3 * 4 + 4 + 4 + 4 + 4 + 1,)


def test_load_and_write_grad_are_inverse_to_vector():
    module = net()
    flat = FlatModule(module)
    target = torch.randn(flat.vector().shape, dtype=F64)
    flat.load(target)
    assert torch.equal(flat.vector(), target)
    flat.write_grad(target)
    assert torch.equal(torch.cat([p.grad.reshape(-1) for p in module.parameters()]), target)


def test_a_loop_of_ones_own_with_an_optimizer():
    module = net()
    flat = FlatModule(module)
    theta = flat.vector()
    gradient = hypergradient(maml(flat), theta, TASKS, EXACT)
    expected = unrolled_gradient(maml(flat), theta, TASKS).mean(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    flat.write_grad(gradient)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    torch.testing.assert_close(flat.vector(), theta - 0.1 * gradient)


@pytest.mark.parametrize("by", ["requires_grad", "adapt"])
def test_what_is_not_adapted_stays_as_it_is(by):
    module = net()
    names = ["3.weight", "3.bias"]
    if by == "requires_grad":
        module[0].requires_grad_(False)
        module[1].requires_grad_(False)
    flat = FlatModule(module, None if by == "requires_grad" else reversed(names))
    assert flat.names == names
    check_against_plain(module, names, flat)
    before = [p.detach().clone() for p in module.parameters()]
    flat.write_grad(torch.ones(5, dtype=F64))
    flat.load(torch.zeros(5, dtype=F64))
    assert [p.grad is None for p in module.parameters()] == [True] * 4 + [False] * 2
    assert all(torch.equal(p, was) for p, was in zip(list(module.parameters())[:4], before, strict=False))
    module[0].weight.data.mul_(2)  # what is not adapted is read anew at every call
    check_against_plain(module, names, flat)


def test_anil_adapts_the_head_and_learns_all():
    module = net()
    flat = FlatModule(module)
    head = flat.index(["3.bias", "3.weight"])
    theta = flat.vector()
    assert torch.equal(theta[head], FlatModule(module, ["3.weight", "3.bias"]).vector())

    def loss(x, y):
        return lambda theta, phi, task: mse_loss(flat(theta.scatter(0, head, phi), task[x]), task[y])

    anil = BilevelProblem(loss(0, 1), loss(2, 3), lambda theta, task: theta[head], [0.1, 0.2, 0.1], draw)
    expected = unrolled_gradient(anil, theta, TASKS)
    assert expected[:, : -len(head)].norm() > 0.01
    for chunk in (None, 1):
        found = hypergradient(anil, theta, TASKS, EXACT, per_task=True, chunk=chunk)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Shared(nn.Module):
    """A submodule under two names, and one layer that is called twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body, self.again, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.net = nn.Sequential(self.body, nn.Tanh(), self.again, nn.Tanh(), self.again, self.head)

    def forward(self, x):
        return self.net(x)


def test_a_submodule_under_two_names_is_trained_by_ones_own_loop():
    module = Shared().double()
    flat, held = FlatModule(module), list(module.parameters())
    check_against_plain(module, flat.names, flat)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(2):
        theta = flat.vector()
        gradient = hypergradient(maml(flat), theta, TASKS, EXACT)
        flat.write_grad(gradient)
        optimizer.step()
        torch.testing.assert_close(flat.vector(), theta - 0.1 * gradient)
    assert all(a is b for a, b in zip(module.parameters(), held, strict=True))


class Tied(nn.Module):
    """One parameter in two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_tied_parameters_are_in_the_vector_once(name):
    module = Tied().double()
    assert len(FlatModule(module).vector()) == 9 + 3 + 3 + 3 + 1
    flat, x = FlatModule(module, [name]), torch.randn(4, 3, dtype=F64)
    moved = flat(flat.vector() + 0.5, x)
    with torch.no_grad():
        module.first.weight += 0.5
    torch.testing.assert_close(moved, module(x))
    assert module.second.weight is module.first.weight


def test_fixed_running_statistics_are_constants():
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    for _ in range(20):
        module(2 + 3 * torch.randn(32, 3, dtype=F64))
    flat = FlatModule(module.eval())
    statistics = {name: b.clone() for name, b in module.named_buffers()}
    check_against_plain(module, flat.names, flat)
    assert all(torch.equal(b, statistics[name]) for name, b in module.named_buffers())
    module.train()
    with pytest.raises(UfomError, match=r"layer '1' \(BatchNorm1d\) updates running statistics.*call .eval\(\)"):
        flat(flat.vector(), TASKS[0][0])


@dataclass
class Output:
    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Keywords(nn.Module):
    """Called by keywords, one of them `vector`; returns a dataclass or a dictionary."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(4)
        self.layer, self.kind = nn.Linear(3, 1), kind

    def forward(self, vector, *, scale=1.0):
        return self.kind(logits=scale * torch.tanh(self.layer(vector)))


@pytest.mark.parametrize("kind", [Output, dict])
def test_keyword_inputs_and_structured_outputs_pass(kind):
    flat = FlatModule(Keywords(kind).double())

    def loss(theta, phi, task):
        found = flat(phi, vector=task[0], scale=2.0)
        return mse_loss(found["logits"] if kind is dict else found.logits, task[1])

    problem = BilevelProblem(loss, loss, lambda theta, task: theta, [0.1, 0.2], draw)
    for chunk in (None, 1):
        found = hypergradient(problem, flat.vector(), TASKS, EXACT, per_task=True, chunk=chunk)
        expected = unrolled_gradient(problem, flat.vector(), TASKS)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_threads_may_call_one_module_at_once():
    module = Shared().double()
    flats = [FlatModule(module), FlatModule(module)]
    problems, theta = [maml(flat) for flat in flats], flats[0].vector()
    one = tuple(t[:1] for t in TASKS)

    def gradient(i):
        return hypergradient(problems[i % 2], theta + 0.1 * i, one, EXACT)

    alone = [gradient(i) for i in range(32)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradient, range(32)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert all(type(p) is nn.Parameter for p in module.parameters())


@pytest.mark.parametrize("make", [Shared, Tied, lambda: nn.LSTM(3, 1)])
def test_a_call_that_fails_or_not_leaves_only_parameters_behind(make):
    module = make().double()
    flat = FlatModule(module)
    flat(flat.vector(), TASKS[0][0])
    with pytest.raises(RuntimeError):
        flat(flat.vector(), torch.zeros(2, 7, dtype=F64))
    held = {id(p) for p in module.parameters()}
    inside = [t for x in module.modules() for t in (*x._parameters.values(), *getattr(x, "_flat_weights", ()))]
    assert {id(t) for t in inside} == held


def test_parameters_that_were_replaced_are_noticed():
    module = net()
    flat = FlatModule(module)
    module[3] = nn.Linear(4, 1).double()
    with pytest.raises(UfomError, match="replaced since"):
        flat(flat.vector(), TASKS[0][0])


FROZEN = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)


@pytest.mark.parametrize(
    ("module", "adapt", "message"),
    [
        (torch.sin, None, "takes an nn.Module"),
        (nn.ReLU(), None, "no parameters to adapt, it has none"),
        (FROZEN, None, "all are frozen"),
        (FROZEN, ["0.weight"], r"'0.weight', which is frozen: call requires_grad_\(True\)"),
        (nn.Linear(2, 2), ["head"], r"\['head'\] are not among the parameters \['weight', 'bias'\]"),
        (nn.Linear(2, 2), [], "at least one name"),
        (nn.LazyLinear(2), None, "'weight' has no shape yet: call the module once"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), None, "replace_all_batch_norm_modules_"),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), None, "eval"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), None, "one device and dtype"),
    ],
)
def test_modules_that_are_no_function_of_their_parameters_are_refused(module, adapt, message):
    with pytest.raises(UfomError, match=message):
        FlatModule(module, adapt)


def test_the_remedy_for_running_statistics_works():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    flat = FlatModule(torch.func.replace_all_batch_norm_modules_(module))
    x = torch.randn(5, 2)
    assert torch.equal(flat(flat.vector(), x), flat(flat.vector(), x))  # no statistics move between two calls


def test_vectors_of_another_length_are_refused():
    flat = FlatModule(nn.Linear(2, 2))
    with pytest.raises(UfomError, match="has 6 parameters"):
        flat(torch.zeros(7), torch.zeros(1, 2))
