"""Learning: a network with its optimiser, an epoch of training, and the evaluation."""

import dataclasses

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import model
from dataset import NUM_DIGITS, NUM_SUMS
from device import Engine
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
    optimizer: torch.optim.Optimizer
    averaged: AveragedModel | None

    @classmethod
    def build(cls, recipe, engine, seed):
        """A network with the seed's initial weights, and its optimiser."""
        torch.manual_seed(seed)
        network = engine.place(model.build(recipe.encoder, recipe.join))
        optimizer = getattr(torch.optim, recipe.optimizer)(
            network.parameters(),
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            fused=engine.device.type in ("cpu", "cuda"),
            **recipe.optimizer_options,
        )
        averaged = None
        if recipe.averaging:
            average = get_ema_multi_avg_fn(recipe.averaging)
            averaged = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
        return cls(recipe, engine, network, optimizer, averaged)

    @property
    def trained(self):
        """The network whose figures are reported: the averaged one, where the recipe averages."""
        return self.averaged.module if self.averaged else self.network

    def state(self):
        """All that training changes, as plain types and tensors."""
        return {
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict() if self.averaged else None,
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state):
        """Take over what `state` gave.

        Raises:
            RunError: it is of another network.
        """
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.averaged:
                self.averaged.load_state_dict(state["averaged"])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError("the checkpoint is of another network; name another") from error


def smoothed(loss, log_probs, recipe):
    """The negative log-likelihood `loss` with the recipe's label smoothing, which it lacks."""
    return (1 - recipe.label_smoothing) * loss - recipe.label_smoothing * log_probs.mean()


def train_epoch(learner, dataset, step, total_steps, stop, bar):
    """Train one epoch, from `step` of `total_steps` on.

    Returns what each step gave, float64 (steps, 5) on the CPU: the mean losses of the digit and of
    the sum, how many digits and how many sums were right, how many images there were. It stays on
    the device till the epoch's end: reading it at each step would make the device wait.
    """
    recipe, network, optimizer = learner.recipe, learner.network, learner.optimizer
    network.train()
    record, sizes = [], []
    for image, digit, addend, total in dataset.batches(recipe.batch_size, recipe.drop_last):
        stop.check()
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.schedule(step, total_steps)
        with learner.engine.autocast():
            digit_log_probs, sum_log_probs = network(image, addend)  # (B, 10), (B, 19)
        digit_loss = F.nll_loss(digit_log_probs, digit)
        sum_loss = F.nll_loss(sum_log_probs, total)
        optimizer.zero_grad()
        loss = recipe.digit_weight * smoothed(digit_loss, digit_log_probs, recipe)
        loss += recipe.sum_weight * smoothed(sum_loss, sum_log_probs, recipe)
        loss.backward()
        optimizer.step()
        if learner.averaged:
            learner.averaged.update_parameters(network)
        digits_right = (digit_log_probs.argmax(dim=1) == digit).sum()
        sums_right = (sum_log_probs.argmax(dim=1) == total).sum()
        record.append(torch.stack([digit_loss, sum_loss, digits_right, sums_right]).detach())
        sizes.append([len(digit)])
        step += 1
        bar.update()
        if step % BAR_EVERY == 0 and not bar.disable:
            bar.set_postfix(digit=f"{digit_loss.item():.3f}", sum=f"{sum_loss.item():.3f}")
    return torch.cat([torch.stack(record).cpu().double(), torch.tensor(sizes)], dim=1)


@torch.no_grad()
def evaluate(learner, dataset, stop):
    """Predictions for each image with each of the ten addends; each image is encoded once."""
    network, engine = learner.trained, learner.engine
    network.eval()
    every_addend = torch.eye(NUM_DIGITS, device=engine.device)
    digit_log_probs, sum_log_probs = [], []
    for indices in torch.arange(len(dataset), device=engine.device).split(EVAL_BATCH):
        stop.check()
        with engine.autocast():
            features = network.encode(dataset.normalised(indices))  # (B, F)
        pairs = features.repeat_interleave(NUM_DIGITS, dim=0)  # (10 B, F)
        digit, total = network.join(pairs, every_addend.repeat(len(indices), 1))
        digit_log_probs.append(digit.view(-1, NUM_DIGITS, NUM_DIGITS))
        sum_log_probs.append(total.view(-1, NUM_DIGITS, NUM_SUMS))
    parts = torch.cat(digit_log_probs), torch.cat(sum_log_probs), dataset.digits
    return Predictions(*(part.cpu() for part in parts))
