"""The class code of the task: class = mask * 6 + gender * 3 + age."""
import numpy as np

MASKS = ("wear", "incorrect", "not wear")
GENDERS = ("male", "female")
AGES = ("<30", "30-59", ">=60")
ATTRIBUTES = {"mask": MASKS, "gender": GENDERS, "age": AGES}
CLASS_NAMES = tuple(f"{mask}, {gender}, {age}"
                    for mask in MASKS for gender in GENDERS for age in AGES)
NUM_CLASSES = len(CLASS_NAMES)
PROBABILITIES = [f"p{label}" for label in range(NUM_CLASSES)]  # column names in csv files

# The seven photos of a person, and the mask state that each shows.
MASK_OF_SHOT = {**{f"mask{i}": 0 for i in range(1, 6)}, "incorrect_mask": 1, "normal": 2}


def encode(mask, gender, age):
    """Return the class 0..17 of mask 0..2, gender 0..1 and age 0..2; ints or arrays."""
    return mask * 6 + gender * 3 + age


def decode(label):
    """Return (mask, gender, age) of a class 0..17; an int or an array."""
    return label // 6, label // 3 % 2, label % 3


def marginals(probabilities):
    """Return the probabilities of mask (N, 3), gender (N, 2) and age (N, 3) from (N, 18)."""
    joint = probabilities.reshape(-1, len(MASKS), len(GENDERS), len(AGES))
    return joint.sum(axis=(2, 3)), joint.sum(axis=(1, 3)), joint.sum(axis=(1, 2))


def age_band(years):
    """Return 0 for under 30, 1 for 30 to 59, 2 for 60 and over; an int or an array of years."""
    return (np.asarray(years) >= 30).astype(int) + (np.asarray(years) >= 60).astype(int)
