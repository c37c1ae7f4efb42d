"""Learning: a network with its optimiser, an epoch of training, and the evaluation."""

import dataclasses

import torch
import torch.nn.functional as F

import model
from dataset import NUM_DIGITS, NUM_SUMS
from device import NEVER, Engine
from recipes import Recipe
from rundir import RunError
from scores import Predictions

EVAL_BATCH = 500  # images; each is joined with all ten addends
BAR_EVERY = 20  # steps between two readings of the loss from the device


@dataclasses.dataclass
class Learner:
    """What learns, and how: all that training changes, beside the recipe and the engine."""

    recipe: Recipe
    engine: Engine
    network: torch.nn.Module
    replica: torch.nn.Module  # the network as training calls it: one of several, or itself
    optimizer: torch.optim.Optimizer

    @classmethod
    def build(cls, recipe, engine, seed):
        """A network with the seed's initial weights, and its optimiser."""
        torch.manual_seed(seed)
        network = engine.place(model.build(recipe.encoder, recipe.join))
        replica = engine.replicate(network)
        optimizer = getattr(torch.optim, recipe.optimizer)(
            network.parameters(),
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            fused=engine.device.type in ("cpu", "cuda"),
            **recipe.optimizer_options,
        )
        return cls(recipe, engine, network, replica, optimizer)

    def state(self):
        """All that training changes, as plain types and tensors."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        """Take over what `state` gave.

        Raises:
            RunError: it is of another network.
        """
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["weight_decay"] = self.recipe.weight_decay  # may be another now
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError("the checkpoint is of another network; name another") from error


def train_epoch(learner, dataset, step, total_steps, stop, bar):
    """Train one epoch, from `step` of `total_steps` on.

    Returns what each step gave, float64 (steps, 5) on the CPU: the mean losses of the digit and of
    the sum, how many digits and how many sums were right, how many images there were. It stays on
    the device till the epoch's end: reading it at each step would make the device wait.
    """
    recipe, engine, optimizer = learner.recipe, learner.engine, learner.optimizer
    learner.network.train()
    record, sizes = [], []
    parts = dataset.batches(recipe.batch_size, recipe.drop_last, engine.rank, engine.world)
    for size, (image, digit, addend, total) in parts:
        stop.check()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.schedule(step, total_steps)
        with engine.autocast():
            digit_log_probs, sum_log_probs = learner.replica(image, addend)  # (B, 10), (B, 19)
        # Sums over this process's part, divided by the whole batch: they add up over processes.
        digit_loss = F.nll_loss(digit_log_probs, digit, reduction="sum") / size
        sum_loss = F.nll_loss(sum_log_probs, total, reduction="sum") / size
        loss = recipe.digit_weight * smoothed(digit_loss, digit_log_probs, size, recipe)
        loss = loss + recipe.sum_weight * smoothed(sum_loss, sum_log_probs, size, recipe)
        optimizer.zero_grad()
        (engine.world * loss).backward()  # the gradients are then averaged over processes
        optimizer.step()
        digits_right = (digit_log_probs.argmax(dim=1) == digit).sum()
        sums_right = (sum_log_probs.argmax(dim=1) == total).sum()
        record.append(torch.stack([digit_loss, sum_loss, digits_right, sums_right]).detach())
        sizes.append([size])
        step += 1
        bar.update()
        if step % BAR_EVERY == 0 and not bar.disable:
            losses = {"digit": digit_loss, "sum": sum_loss}
            bar.set_postfix({k: f"{engine.world * v.item():.3f}" for k, v in losses.items()})
    engine.share_buffers(learner.network)
    record = engine.add_up(torch.stack(record)).cpu().double()
    return torch.cat([record, torch.tensor(sizes)], dim=1)


def smoothed(loss, log_probs, size, recipe):
    """The negative log-likelihood `loss` with the recipe's label smoothing, which it lacks.

    That is the cross entropy with a target of which every class has a small share.
    """
    every_class = -log_probs.sum() / (size * log_probs.shape[1])
    return (1 - recipe.label_smoothing) * loss + recipe.label_smoothing * every_class


@torch.no_grad()
def evaluate(learner, dataset, stop=NEVER):
    """Predictions for each image with each of the ten addends; each image is encoded once."""
    network, engine = learner.network, learner.engine
    network.eval()
    count, every_addend = len(dataset), torch.eye(NUM_DIGITS, device=engine.device)
    digit_log_probs = torch.zeros(count, NUM_DIGITS, NUM_DIGITS, device=engine.device)
    sum_log_probs = torch.zeros(count, NUM_DIGITS, NUM_SUMS, device=engine.device)
    part = torch.arange(engine.rank, count, engine.world, device=engine.device)
    for indices in part.split(EVAL_BATCH):
        stop.check()
        with engine.autocast():
            features = network.encode(dataset.normalised(indices))  # (B, F)
        pairs = features.repeat_interleave(NUM_DIGITS, dim=0)  # (10 B, F)
        digit, total = network.join(pairs, every_addend.repeat(len(indices), 1))
        digit_log_probs[indices] = digit.view(-1, NUM_DIGITS, NUM_DIGITS)
        sum_log_probs[indices] = total.view(-1, NUM_DIGITS, NUM_SUMS)
    parts = engine.add_up(digit_log_probs), engine.add_up(sum_log_probs), dataset.digits
    return Predictions(*(part.cpu() for part in parts))


def restore(state):
    """The trained network of a checkpoint's state, ready to predict.

    Raises:
        RunError: it is of a network that this program does not have.
    """
    recipe = state["recipe"]
    try:
        network = model.build(recipe["encoder"], recipe["join"])
        network.load_state_dict(state["network"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise RunError("the checkpoint is of another network; name another") from error
    return network.eval()
