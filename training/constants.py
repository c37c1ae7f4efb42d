"""Sizes of the task, and facts about MNIST."""

NUM_DIGITS = 10
NUM_SUMS = 19
SIDE = 28  # pixels
MEAN, STD = 0.1307, 0.3081  # of the training set's pixels, scaled to 0..1
# Test images with a disputed label (Northcutt et al. 2021, arXiv 2103.14749).
DISPUTED = {947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729}
