"""Which heads add? Train each with some pairs of digit and addend left out, and test on those.

python -m benchmarks.heads --recipe fast --output results/heads.json
python -m benchmarks.heads --networks shared-trunk added --seeds 1 --unseen 0 30    # as published

Prints a table in Markdown: sums right with all pairs in training, then those of the unseen pairs.
Flags of train.py go after --. After an interruption the same command continues.
"""

import sys

import numpy as np

from benchmarks import common, seeds
from dataset import NUM_DIGITS, NUM_SUMS, draw_unseen
from recipes import RECIPES
from training.console import Number, Parser, exit_status
from training.recipe import choices_of

OURS = ["ComplexNumbers", "OuterProduct"]
PUBLISHED = ["ConcatMLP", "ConcatLinear", "SharedTrunk", "Added"]
ON_PROBABILITIES = ["ConcatProbabilities", "AddedProbabilities"]


def limit(unseen):
    """The share of the unseen pairs, bool (10, 10), that follow from the seen ones.

    If each number is a vector z with z[digit] + z[addend] = z[sum], an unseen pair follows if its
    equation is a linear combination of those of the seen ones.
    """
    unit = np.eye(NUM_SUMS)
    digit, addend = np.indices((NUM_DIGITS, NUM_DIGITS)).reshape(2, -1)  # (100,) each
    equations = unit[digit] + unit[addend] - unit[digit + addend]  # (100, 19)
    mask = np.asarray(unseen).flatten()
    seen, rank = equations[~mask], np.linalg.matrix_rank(equations[~mask])
    ranks = [np.linalg.matrix_rank([*seen, equation]) for equation in equations[mask]]
    return np.mean(np.array(ranks) == rank)


def table(results):
    """The results file in Markdown: mean (sd) over seeds, in percent."""
    lines = []
    for name, row in results["rows"].items():
        metrics = [one["metrics"] for one in row.values()]
        cells = [common.percent(one.get("unseen_sum", one["sum"])) for one in metrics]
        lines.append([f"`{name}`", *cells])
    lines.append(["limit", *map(common.percent, results["limit"].values())])
    return common.markdown(["", *results["limit"]], lines)


def parse_args(argv):
    parser = Parser(prog="heads.py", description=__doc__)
    common.add_flags(parser, "heads.json", recipe="fast", seeds=5)
    flag, heads = parser.add_argument, OURS + PUBLISHED + ON_PROBABILITIES
    text = "heads on the encoder of --recipe, or recipes as they are (default: %(default)s)"
    choices = [*choices_of("head", RECIPES), *RECIPES]
    flag("--networks", nargs="+", choices=choices, default=heads, metavar="NAME", help=text)
    text, count = "numbers of unseen pairs (default: %(default)s)", Number(int, 0, 75)
    flag("--unseen", nargs="+", type=count, default=[0, 10, 30, 50, 70], metavar="N", help=text)
    return parser.parse_args(argv)


@exit_status
def main(argv):
    args = parse_args(argv)
    numbers, rows, limits = range(args.seeds), {}, {}
    for name in args.networks:
        network = [name] if name in RECIPES else [args.recipe, "--head", name]
        base = ["--recipe", *network, *args.flags, "--unseen-pairs"]
        flags = {f"{name}, {count} unseen": [*base, str(count)] for count in args.unseen}
        rows[name] = seeds.measure(flags, numbers)
    for count in args.unseen:
        shares = [limit(draw_unseen(count, seed)) for seed in numbers] if count else [1.0]
        limits[f"{count} unseen"] = common.summary(shares)
    results = common.provenance("heads", argv) | {"rows": rows, "limit": limits}
    print("", table(results), "", sep="\n")
    common.save_json(args.output, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
