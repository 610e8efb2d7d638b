"""The people of the sample dataset: invented and drawn, nobody's photo.

A person keeps face, age and hair in all seven photos (`invent_person`). Mask, mouth, clothes,
position, pose and light change from photo to photo (`draw_photo`).
"""
import functools
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

WIDTH, HEIGHT = 384, 512

SKINS = ((252, 224, 200), (238, 196, 164), (214, 164, 124), (160, 108, 76), (104, 68, 50))
DARK_HAIR = ((24, 20, 22), (46, 32, 28), (78, 52, 36), (108, 70, 44))
LIGHT_HAIR = ((206, 166, 100), (226, 196, 140), (170, 66, 40), (196, 90, 140), (80, 110, 180))
GREY_HAIR = ((150, 150, 152), (184, 184, 186), (222, 222, 220), (238, 236, 230))
MASK_COLORS = ((244, 246, 248), (150, 196, 226), (40, 42, 48), (240, 180, 196), (70, 90, 140))
INK = (30, 16, 16)
CURVE_STEPS = np.linspace(0, 1, 6, endpoint=False)[:, None, None]


def invent_person(rng, female, group):
    """Return what a person keeps in every photo.

    Gender and age show in several traits, some of which a mask does not hide.

    Args:
        rng: NumPy generator.
        female: 0 or 1.
        group: age band 0..2.
    """
    # Years, and wrinkles from 0 (none) to about 1.
    low, high, mean, spread = ((18, 29, 22, 3.5), (30, 59, 45, 6), (60, 79, 68, 4))[group]
    age = int(np.clip(round(rng.normal(mean, spread)), low, high))
    wrinkles = float(np.clip((age - 26) / 38 + rng.normal(0, 0.04), 0, 1.1))

    # Colours of skin and hair. Most young people have light or dyed hair; old people are grey.
    tone = rng.uniform(0, 1) ** 1.3 * (len(SKINS) - 1.01)
    skin = mix(SKINS[int(tone)], SKINS[int(tone) + 1], tone % 1)
    odds = ((0.2, 0.8, 0), (0.97, 0.03, 0), (0.01, 0.01, 0.98))[group]
    palette = (DARK_HAIR, LIGHT_HAIR, GREY_HAIR)[rng.choice(3, p=odds)]
    hair = vary(rng, palette[rng.integers(len(palette))], 10)

    # The hair behind the face, then everything else.
    back = (0.02, 0.38, 0.6) if female else (0.98, 0.01, 0.01)
    return SimpleNamespace(
        age=age, wrinkles=wrinkles, skin=skin, hair=hair, brow=mix(hair, INK, 0.35),
        fringe=rng.random() < (0.5 if female else 0.15),
        back=rng.choice(("none", "bob", "long"), p=back),
        hairline=-0.72 - (1 - female) * 0.28 * wrinkles * rng.uniform(0.3, 1),
        volume=rng.uniform(0.0, 0.16),
        jaw=rng.normal(0.78 if female else 0.98, 0.05),
        chin=rng.normal(0.8 if female else 1.2, 0.09),
        neck=rng.normal(0.46 if female else 0.7, 0.05), shoulders=2.0 if female else 2.45,
        brow_width=rng.normal(0.05 if female else 0.15, 0.012),
        lid_width=0.075 if female else 0.035,
        lips=vary(rng, (196, 54, 76), 24) if female else mix(skin, (150, 60, 60), 0.4),
        lip_height=rng.normal(0.12 if female else 0.055, 0.01),
        eye=rng.uniform(0.92, 1.12) * (1.1 if female else 0.95))


def mix(a, b, share):
    """Return the colour between a (share 0) and b (share 1)."""
    return tuple(int(round(x + (y - x) * share)) for x, y in zip(a, b, strict=True))


def vary(rng, colour, spread):
    """Return a colour with normal noise on each channel."""
    return tuple(int(np.clip(c + rng.normal(0, spread), 0, 255)) for c in colour)


def draw_photo(person, state, rng):
    """Draw one photo of a person.

    Args:
        person: from `invent_person`.
        state: 0 mask worn, 1 worn incorrectly, 2 no mask.
        rng: NumPy generator.

    Returns:
        PIL image of 384 x 512 pixels.
    """
    # Drawn at twice the size and reduced, which smooths the edges.
    background = vary(rng, [rng.uniform(60, 235)] * 3, 24)
    image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT), background)
    centre = 2 * np.array([WIDTH / 2 + rng.normal(0, 20), HEIGHT * 0.46 + rng.normal(0, 20)])
    scale, tilt = 2 * rng.uniform(118, 140), rng.normal(0, 0.05)
    turn = np.clip(rng.normal(0, 0.15), -0.45, 0.45)
    head = Pen(image, centre, scale, tilt, turn)
    body = Pen(image, centre, scale, tilt * 0.3, turn * 0.3)
    draw_back_hair(head, person)
    draw_body(body, person, rng)
    draw_face(head, person)
    draw_nose_and_mouth(head, person, rng)
    if state < 2:
        draw_mask(head, state, rng)
    draw_eyes(head, person)
    draw_front_hair(head, person)
    return add_camera_effects(image.reduce(2), rng)


class Pen:
    """Draws on a turned and tilted head.

    Coordinates are face units: 1 is half the width of a face, (0, 0) is between the eyes.
    """

    def __init__(self, image, centre, scale, tilt, turn):
        self.draw, self.centre, self.scale = ImageDraw.Draw(image), centre, scale
        self.sin_turn, self.cos_turn = np.sin(turn), np.cos(turn)
        self.tilt = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])

    def to_pixels(self, points, depth=None):
        x, y = np.asarray(points, float).T
        # Without a depth the points are on a ball, so that a turn moves nose and mouth the most.
        if depth is None:
            depth = np.sqrt(np.clip(1 - x**2 / 1.1 - y**2 / 2.2, 0, 1))
        flat = np.stack([x * self.cos_turn + depth * self.sin_turn, y - 1.2], axis=1) @ self.tilt
        return self.centre + self.scale * (flat + (0, 1.2))

    def fill(self, points, colour, depth=None, smooth=True):
        points = curve(points, closed=True) if smooth else points
        self.draw.polygon(self.to_pixels(points, depth).ravel().tolist(), colour)

    def line(self, points, colour, width, depth=None):
        points = self.to_pixels(curve(points, closed=False), depth).ravel().tolist()
        self.draw.line(points, colour, round(width * self.scale))

    def dot(self, point, radius, colour):
        (x, y), r = self.to_pixels([point])[0], np.broadcast_to(radius, 2) * self.scale
        self.draw.ellipse((x - r[0], y - r[1], x + r[0], y + r[1]), colour)


def curve(points, closed):
    """Return a smooth line through the points (Catmull-Rom spline)."""
    p = np.asarray(points, float)
    p = np.vstack([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    a, b, c, d, t = p[:-3], p[1:-2], p[2:-1], p[3:], CURVE_STEPS
    cubic = 3 * b - a - 3 * c + d
    line = b + ((c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + cubic * t**3) / 2
    line = line.transpose(1, 0, 2).reshape(-1, 2)
    return line if closed else np.vstack([line, p[-1:]])


def mirror(points):
    """Complete an outline from its right half, given from top to bottom."""
    return [*points, *((-x, y) for x, y in reversed(points) if x)]


def draw_back_hair(pen, person):
    end = {"none": None, "bob": 1.0, "long": 2.4}[person.back]
    if end:
        fall = [(0, -1.4), (1.0, -1.1), (1.28, 0.0), (1.38, end * 0.8), (0.9, end + 0.2), (0, end)]
        pen.fill(mirror(fall), mix(person.hair, INK, 0.2), -0.2)


def draw_body(pen, person, rng):
    cloth = tuple(int(c) for c in rng.integers(20, 245, 3))
    # Neck, then the clothes.
    neck, wide = person.neck, person.shoulders
    throat = mirror([(neck, 0.7), (neck, 1.6), (neck + 0.3, 2.1), (0, 2.9)])
    pen.fill(throat, mix(person.skin, INK, 0.22), 0, smooth=False)
    pen.fill(mirror([(0, 2.2), (neck + 0.12, 1.72), (wide - 0.5, 2.05), (wide, 2.6),
                     (wide + 0.2, 6)]), cloth, 0, smooth=False)


def draw_face(pen, person):
    skin, wrinkles = person.skin, person.wrinkles
    for side in (-1, 1):  # ears
        pen.dot((side * 1.02, 0.05), (0.12, 0.3), mix(skin, INK, 0.1))
    outline = [(0, -1.3), (0.58, -1.2), (0.93, -0.7), (1.0, -0.1), (0.97, 0.35),
               (0.9 * person.jaw, 0.85), (0.45 * person.chin, 1.25), (0, 1.36)]
    pen.fill(mirror(outline), skin)
    # Wrinkles: on the forehead, beside and under the eyes, and from the nose to the mouth.
    colour = mix(skin, INK, min(0.85, 0.55 + 0.35 * wrinkles))
    width = 0.07 + 0.04 * wrinkles
    for i in range(int(np.searchsorted((0.12, 0.34, 0.66), wrinkles))):
        y, half = -0.52 - 0.13 * i, 0.5 - 0.05 * i
        pen.line([(-half, y + 0.03), (-half / 2, y - 0.02), (half / 2, y), (half, y + 0.03)],
                 colour, width)
    for side in (-1, 1):
        for i in range(int(np.searchsorted((0.2, 0.5, 0.75), wrinkles))):
            pen.line([(side * 0.68, -0.03 + 0.05 * i), (side * 0.88, -0.14 + 0.13 * i)], colour,
                     width)
        if wrinkles > 0.25:
            pen.line([(side * 0.24, 0.14), (side * 0.42, 0.22), (side * 0.62, 0.12)], colour, width)
            pen.line([(side * 0.22, 0.4), (side * 0.36, 0.58), (side * 0.4, 0.8)], colour, width)


def draw_nose_and_mouth(pen, person, rng):
    skin, lips = person.skin, person.lips
    # Nose.
    dark = mix(skin, INK, 0.42)
    pen.line([(0.09, -0.02), (0.12, 0.2), (0.2, 0.4), (0.1, 0.47)], dark, 0.06)
    pen.line([(-0.2, 0.38), (-0.15, 0.47), (0, 0.5), (0.15, 0.47), (0.2, 0.38)], dark, 0.075)
    for x in (-0.09, 0.09):
        pen.dot((x, 0.46), (0.06, 0.04), mix(skin, INK, 0.85))
    # Mouth.
    smile, half, height = rng.uniform(-0.04, 0.1), rng.uniform(0.3, 0.4), person.lip_height
    left, right = (-half, 0.8 - smile), (half, 0.8 - smile)
    pen.fill([left, (-0.12, 0.8 - height), (0.12, 0.8 - height), right, (0.15, 0.84 + height),
              (-0.15, 0.84 + height)], lips)
    pen.line([left, (0, 0.82), right], mix(lips, INK, 0.6), 0.035)


def draw_mask(pen, state, rng):
    """Worn: from nose to chin. Incorrect (state 1): below the nose, or below the mouth."""
    top, bottom, half = rng.uniform(0.1, 0.2), rng.uniform(1.42, 1.5), 0.94
    if state == 1:
        below_mouth = (rng.uniform(0.94, 1.0), 1.7, 0.84)
        below_nose = (rng.uniform(0.62, 0.7), 1.48, 0.92)
        top, bottom, half = below_mouth if rng.random() < 0.5 else below_nose
    colour = vary(rng, MASK_COLORS[rng.integers(len(MASK_COLORS))], 10)
    dark = mix(colour, (40, 40, 60), 0.28)
    # Upper and lower edge, bent around nose and chin.
    xs = np.linspace(-half, half, 11)
    upper = top + 0.18 * xs**2 - 0.07 * np.exp(-((xs / 0.25) ** 2))
    lower = bottom - 0.56 * np.abs(xs) ** 2.2

    def across(share):
        # The line at this share of the way from the upper to the lower edge.
        return np.stack([xs, upper + (lower - upper) * share], axis=1)

    for side in (-1, 1):  # straps
        pen.line([across(0.1)[-1] * (side, 1), (side * 1.04, 0.12)], dark, 0.05, 0.05)
    pen.fill(np.vstack([across(0), across(1)[::-1]]), colour, smooth=False)
    if rng.random() < 0.5:  # folds
        for share in (0.28, 0.5, 0.72):
            pen.line(across(share), dark, 0.03)
    pen.line(across(0.02), dark, 0.035)
    pen.line(across(0.99), dark, 0.03)


def draw_eyes(pen, person):
    height = 0.11 * person.eye
    for side in (-1, 1):
        def at(*points, side=side):
            return [(side * x, y) for x, y in points]
        # White, iris and pupil, upper lid, eyebrow.
        pen.fill(at((0.2, 0.02), (0.42, -height), (0.65, 0), (0.43, height * 0.8)),
                 (248, 246, 242))
        pen.dot((side * 0.43, 0), 0.1 * person.eye, (60, 44, 34))
        pen.dot((side * 0.43, 0), 0.05, (12, 10, 12))
        pen.line(at((0.18, 0.03), (0.42, -height - 0.01), (0.67, 0)), INK,
                 person.lid_width)
        pen.line(at((0.18, -0.29), (0.48, -0.35), (0.74, -0.27)), person.brow,
                 max(0.04, person.brow_width))


def draw_front_hair(pen, person):
    top = -1.42 - person.volume
    line = -0.42 if person.fringe else person.hairline
    pen.fill(mirror([(0, top), (0.7, top + 0.12), (1.08, -0.85), (1.07, -0.1), (0.95, -0.05),
                     (0.9, -0.45), (0.78, line + 0.12), (0.4, line), (0, line)]), person.hair, 0.1)


def add_camera_effects(photo, rng):
    """Add blur, a colour cast and sensor noise; change the brightness."""
    if rng.random() < 0.5:
        photo = photo.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.2)))
    # Brightness and colour cast, as one lookup table per channel.
    gain = rng.uniform(0.65, 1.1) * rng.normal(1, 0.035, 3)
    lift = rng.uniform(0, 16)
    table = [int(min(255, lift + value * g)) for g in gain for value in range(256)]
    noise = ImageChops.offset(noise_image(), int(rng.integers(WIDTH)), int(rng.integers(HEIGHT)))
    return ImageChops.add(photo.point(table), noise, 1, -128)


@functools.cache
def noise_image():
    noise = np.random.default_rng(0).normal(128, 4, (HEIGHT, WIDTH, 3))
    return Image.fromarray(noise.clip(0, 255).round().astype(np.uint8))
