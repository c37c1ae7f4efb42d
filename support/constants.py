"""Sizes of the task and of MNIST."""

NUM_DIGITS = 10
NUM_SUMS = 19
SIDE = 28  # pixels
MEAN, STD = 0.1307, 0.3081  # of the training set's pixels, scaled to 0..1
