"""How far predictions can be trusted: accuracy by group of people, and calibration."""
import numpy as np
import pandas as pd

MIN_PEOPLE = 10  # an interval over fewer people would mean little
NUM_BINS = 15


def draw_people(people, num_draws, seed):
    """Return a bootstrap over people: (person of each photo, how often each person is drawn).

    Args:
        people: (N,) the person on each photo.

    Returns:
        Integer arrays (N,) of 0..P-1 and (num_draws, P).
    """
    _, person = np.unique(np.asarray(people), return_inverse=True)
    count = person.max() + 1
    rng = np.random.default_rng(seed)
    return person, rng.multinomial(count, np.full(count, 1 / count), size=num_draws)


def bootstrap_rates(groups, people, num_draws=2000, seed=0):
    """Return how often the photos of each group are right, with a bootstrap over people.

    Args:
        groups: by name, (is a photo right?, is it in the group?), each (N,) bool.
        people: (N,) the person on each photo.

    Returns:
        DataFrame indexed by name: people, rate in [0, 1] (NaN for an empty group), draws (the rate
        in each bootstrap sample), text (rate and 95 % interval; without the interval for a group
        of fewer than MIN_PEOPLE people).
    """
    person, times_drawn = draw_people(people, num_draws, seed)
    count = times_drawn.shape[1]
    # Photos and right photos of each person in each group give the rates of all samples at once.
    photos = np.stack([np.bincount(person, where, count) for _, where in groups.values()], axis=1)
    hits = np.stack([np.bincount(person, right & where, count)
                     for right, where in groups.values()], axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        rates, draws = hits.sum(0) / photos.sum(0), (times_drawn @ hits) / (times_drawn @ photos)
    table = pd.DataFrame({"people": (photos > 0).sum(0), "rate": rates, "draws": list(draws.T)},
                         index=list(groups))
    bounds = [np.nanpercentile(row.draws, [2.5, 97.5]) if row.people >= MIN_PEOPLE else ()
              for row in table.itertuples()]
    return table.assign(text=[format_interval(rate, *pair) if rate >= 0 else ""
                              for rate, pair in zip(rates, bounds, strict=True)])


def describe_interval(low, high, number, unit="people", sign=""):
    """Return a 95 % interval over `number` people in words; without bounds below MIN_PEOPLE."""
    if number < MIN_PEOPLE:
        return f"no interval: {number} {unit} are too few"
    return f"95 % interval {low:{sign}.4f} .. {high:{sign}.4f} over {number} {unit}"


def format_interval(value, low=None, high=None):
    """Return a number and, if it has one, its interval as text."""
    return f"{value:.2f}" if low is None else f"{value:.2f} ({low:.2f} .. {high:.2f})"


def largest_gap(rates):
    """Return (best group, worst group, difference, low, high), or None without two large groups.

    The 95 % interval is that of the difference between these two groups (the same people are drawn
    for both).

    Args:
        rates: rows of `bootstrap_rates`; groups of fewer than MIN_PEOPLE people are left out.
    """
    # Small groups have extreme rates by chance.
    rates = rates[rates.people >= MIN_PEOPLE]
    if len(rates) < 2:
        return None
    best, worst = rates.rate.idxmax(), rates.rate.idxmin()
    draws = rates.draws[best] - rates.draws[worst]
    return best, worst, rates.rate[best] - rates.rate[worst], *np.nanpercentile(draws, [2.5, 97.5])


def calibration(confidence, is_right):
    """Return (expected calibration error, bins): does confidence equal accuracy?

    The error is the mean difference between the two over 15 bins of equal width, weighted by the
    photos in them (Guo et al. 2017, equation 3).

    Args:
        confidence: (N,) probability of the predicted class.
        is_right: (N,) bool.

    Returns:
        The error in [0, 1], and a DataFrame with the photos, confidence and accuracy of each bin
        that is not empty.
    """
    index = np.ceil(np.asarray(confidence) * NUM_BINS).clip(1) - 1
    table = pd.DataFrame({"photos": 1, "confidence": confidence, "accuracy": is_right})
    bins = table.groupby(index).agg({"photos": "sum", "confidence": "mean", "accuracy": "mean"})
    error = (bins.photos * (bins.accuracy - bins.confidence).abs()).sum() / bins.photos.sum()
    return float(error), bins
