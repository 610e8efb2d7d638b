"""The people of the sample dataset: invented and drawn, nobody's photo.

A person keeps face, age and hair in all seven photos (`invent_person`); mask, mouth, clothes, place, pose and light change
(`draw_photo`).
"""
import functools
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

WIDTH, HEIGHT = 384, 512

SKINS = ((252, 224, 200), (238, 196, 164), (214, 164, 124), (160, 108, 76), (104, 68, 50))
DARK = ((24, 20, 22), (46, 32, 28), (78, 52, 36), (108, 70, 44))
LIGHT = ((206, 166, 100), (226, 196, 140), (150, 66, 40))
DYED = ((196, 90, 140), (80, 110, 180), (120, 80, 160), (70, 140, 120))
GREY = ((150, 150, 152), (184, 184, 186), (222, 222, 220), (238, 236, 230))
MASKS = ((244, 246, 248), (236, 240, 244), (150, 196, 226), (40, 42, 48), (240, 180, 196), (226, 190, 160),
         (150, 190, 160), (70, 90, 140), (170, 60, 70), (150, 150, 156))
INK = (30, 16, 16)
CURVE_STEPS = np.linspace(0, 1, 6, endpoint=False)[:, None, None]


def invent_person(rng, female, group):
    """What one person keeps in every photo. Gender and age show in several traits, some also under a mask."""
    low, high, mean, spread = ((18, 29, 22, 3.5), (30, 59, 45, 6), (60, 79, 68, 4))[group]
    age = int(np.clip(round(rng.normal(mean, spread)), low, high))
    wear = float(np.clip((age - 26) / 38 + rng.normal(0, 0.04), 0, 1.1))  # how lined the face is
    skin_place = rng.uniform(0, 1) ** 1.3 * (len(SKINS) - 1.01)
    skin = mix(SKINS[int(skin_place)], SKINS[int(skin_place) + 1], skin_place % 1)
    palettes = (DARK, LIGHT, DYED, GREY)
    palette_odds = ((0.62, 0.22, 0.16, 0), (0.8, 0.18, 0.02, 0), (0.03, 0.02, 0, 0.95))[group]
    palette = palettes[rng.choice(4, p=palette_odds)]
    hair = jitter(rng, palette[rng.integers(len(palette))], 10)
    grey_brows = rng.random() < (0, 0.03, 0.95)[group]
    brow = GREY[rng.integers(3)] if grey_brows else mix(hair if palette is DARK else DARK[1], INK, 0.35)
    fronts = ("crop", "quiff", "part", "fringe", "curls", "bald")
    bald = (0, 0.1, 0.3)[group]
    front = (0.2, 0.03, 0.37, 0.26, 0.14, 0) if female else (0.42 - bald, 0.24, 0.14, 0.1, 0.1, bald)
    back = (0.06, 0.28, 0.42, 0.1, 0.14) if female else (0.92, 0.03, 0.03, 0.01, 0.01)
    if female and group == 2:
        back = (0.14, 0.5, 0.2, 0.13, 0.03)
    beard = 0 if female else rng.choice(3, p=(0.15, 0.35, 0.5))
    return SimpleNamespace(
        female=female, age=age, wear=wear, skin=skin, hair=hair, brow=brow,
        front=str(rng.choice(fronts, p=front)), back=str(rng.choice(("none", "bob", "long", "bun", "tail"), p=back)),
        hairline=-0.72 - (0.0 if female else 0.28) * wear * rng.uniform(0.3, 1), volume=rng.uniform(0.0, 0.16),
        streaks=rng.random() < (0, 0.8, 0.6)[group], jaw=rng.normal(0.78 if female else 0.98, 0.05),
        chin=rng.normal(0.8 if female else 1.2, 0.09), neck=rng.normal(0.46 if female else 0.7, 0.05),
        brow_weight=rng.normal(0.05 if female else 0.14, 0.012), brow_arch=rng.normal(0.1 if female else 0.0, 0.03),
        lashes=female and rng.random() < 0.97, shadow=female and rng.random() < 0.8,
        lips=jitter(rng, (196, 54, 76), 24) if female and rng.random() < 0.92 else mix(skin, (150, 60, 60), 0.4),
        lip_height=rng.normal(0.12 if female else 0.055, 0.01), beard=int(beard),
        earrings=rng.random() < (0.8 if female else 0.03), glasses=rng.random() < (0.1, 0.16, 0.22)[group],
        iris=((60, 40, 30), (40, 28, 24), (70, 100, 120), (80, 96, 60))[rng.choice(4, p=(0.5, 0.3, 0.1, 0.1))],
        eye=rng.uniform(0.92, 1.12) * (1.1 if female else 0.95), hat=rng.random() < 0.18,
        cheeks=rng.random() < (0.7, 0.1, 0)[group], freckles=rng.random() < (0.2, 0.05, 0)[group])


def mix(a, b, share):
    return tuple(int(round(x + (y - x) * share)) for x, y in zip(a, b, strict=True))


def jitter(rng, colour, spread):
    return tuple(int(np.clip(c + rng.normal(0, spread), 0, 255)) for c in colour)


def draw_photo(person, state, rng):
    """One photo of a person; state 0 mask worn, 1 worn wrongly, 2 none. Drawn at twice the size, against jaggies."""
    image = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT))
    draw_background(ImageDraw.Draw(image), rng)
    centre = 2 * np.array([WIDTH / 2 + rng.normal(0, 20), HEIGHT * 0.46 + rng.normal(0, 20)])
    scale, tilt, turn = 2 * rng.uniform(118, 140), rng.normal(0, 0.05), rng.normal(0, 0.15)
    head = Pen(image, centre, scale, tilt, np.clip(turn, -0.45, 0.45))
    body = Pen(image, centre, scale, tilt * 0.3, turn * 0.3)
    draw_back_hair(head, person)
    draw_body(body, person, rng)
    draw_face(head, person, rng)
    draw_nose_and_mouth(head, person, rng)
    if state < 2:
        draw_mask(head, state, rng)
    draw_eyes(head, person)
    draw_front_hair(head, person, person.hat and rng.random() < 0.5, rng)
    return develop(image.reduce(2), rng)


def draw_background(draw, rng):
    base = jitter(rng, [rng.uniform(60, 235)] * 3, 24)
    second = jitter(rng, base, 22)
    draw.rectangle((0, 0, 2 * WIDTH, 2 * HEIGHT), base)
    kind = rng.integers(5)
    if kind == 1:
        for x in range(0, 2 * WIDTH, step := int(rng.integers(60, 200))):
            draw.rectangle((x, 0, x + step // 2, 2 * HEIGHT), second)
    elif kind == 2:
        draw.rectangle((0, 2 * HEIGHT * rng.uniform(0.2, 0.8), 2 * WIDTH, 2 * HEIGHT), second)
    elif kind >= 3:
        for _ in range(int(rng.integers(3, 9))):
            x, y, w, h = rng.uniform((-100, -100, 80, 80), (700, 900, 400, 500))
            shape = draw.rectangle if kind == 3 else draw.ellipse
            shape((x, y, x + w, y + h), jitter(rng, base, 22))


class Pen:
    """Draws on a turned and tilted head, in face units: 1 is half a face's width, (0, 0) lies between the eyes."""

    def __init__(self, image, centre, scale, tilt, turn):
        # By the number of a colour's channels: blending translucent shapes is slow, so only these are blended.
        self.draws = {3: ImageDraw.Draw(image), 4: ImageDraw.Draw(image, "RGBA")}
        self.centre, self.scale = centre, scale
        self.sin_turn, self.cos_turn = np.sin(turn), np.cos(turn)
        self.tilt = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])

    def place(self, points, depth=None):
        x, y = np.asarray(points, float).T
        # Without a depth the points lie on the face's ball, so that a turn moves nose and mouth the most.
        z = np.sqrt(np.clip(1 - x**2 / 1.1 - y**2 / 2.2, 0, 1)) if depth is None else depth
        flat = np.stack([x * self.cos_turn + z * self.sin_turn, y - 1.2], axis=1) @ self.tilt
        return self.centre + self.scale * (flat + (0, 1.2))

    def fill(self, points, colour, depth=None, round_off=True):
        points = curve(points, closed=True) if round_off else points
        self.draws[len(colour)].polygon(self.place(points, depth).ravel().tolist(), colour)

    def stroke(self, points, colour, width, depth=None):
        points = self.place(curve(points, closed=False), depth)
        self.draws[len(colour)].line(points.ravel().tolist(), colour, round(width * self.scale))

    def dot(self, point, radius, colour, depth=None):
        (x, y), r = self.place([point], depth)[0], np.broadcast_to(radius, 2) * self.scale
        self.draws[len(colour)].ellipse((x - r[0], y - r[1], x + r[0], y + r[1]), colour)


def curve(points, closed):
    """A smooth (Catmull-Rom) line through the points."""
    p = np.asarray(points, float)
    p = np.vstack([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
    t = CURVE_STEPS
    line = (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3) / 2
    line = line.transpose(1, 0, 2).reshape(-1, 2)
    return line if closed else np.vstack([line, p[-1:]])


def mirror(points):
    """Closes the outline of a right half, given from top to bottom, with its mirror image."""
    return [*points, *((-x, y) for x, y in reversed(points) if x)]


def draw_back_hair(pen, person):
    hair = mix(person.hair, INK, 0.2)
    if person.front == "bald":
        return
    if person.back == "bob":
        pen.fill(mirror([(0, -1.4), (1.0, -1.1), (1.28, 0.0), (1.3, 0.9), (0.9, 1.2), (0, 1.1)]), hair, -0.2)
    elif person.back == "long":
        fall = [(0, -1.4), (1.0, -1.1), (1.27, 0.0), (1.4, 1.4), (1.45, 2.5), (0.8, 2.7), (0, 2.2)]
        pen.fill(mirror(fall), hair, -0.2)
    elif person.back == "bun":
        pen.dot((0, -1.62), 0.45, hair, -0.3)
    elif person.back == "tail":
        tail = [(0.3, -1.4), (1.2, -1.2), (1.65, -0.3), (1.6, 1.0), (1.4, 1.6), (1.25, 0.6), (1.15, -0.3)]
        pen.fill(tail, hair, -0.4)


def draw_body(pen, person, rng):
    cloth, second = (tuple(int(c) for c in rng.integers(20, 245, 3)) for _ in range(2))
    shade = mix(person.skin, INK, 0.22)
    neck, wide = person.neck, 2.0 if person.female else 2.45
    pen.fill(mirror([(neck, 0.7), (neck, 1.6), (neck + 0.3, 2.1), (0, 2.9)]), shade, 0, round_off=False)
    pen.fill(mirror([(neck + 0.12, 1.72), (wide - 0.5, 2.05), (wide, 2.6), (wide + 0.2, 6), (0, 6)])[:-1] +
             [(-neck - 0.12, 1.72), (-0.3, 2.2), (0.3, 2.2)], cloth, 0, round_off=False)
    kind = rng.integers(5)
    if kind == 1:  # shirt collar
        for side in (-1, 1):
            pen.fill([(side * (neck + 0.1), 1.6), (side * (neck + 0.4), 2.0), (side * 0.4, 2.5), (0, 2.2)], second, 0,
                     round_off=False)
    elif kind == 2:  # polo neck or scarf, up to the chin
        pen.fill(mirror([(0, 1.5), (neck + 0.08, rng.uniform(1.2, 1.5)), (neck + 0.25, 2.1), (0, 2.35)]), second, 0)
    elif kind == 3:
        for y in np.arange(2.4, 5, 0.36):
            pen.stroke([(-wide, y), (0, y + 0.1), (wide, y)], second, 0.14, 0)
    elif kind == 4:  # hood
        pen.stroke([(-neck - 0.4, 1.8), (-0.3, 2.35), (0.3, 2.35), (neck + 0.4, 1.8)], mix(cloth, INK, 0.3), 0.22, 0)


def draw_face(pen, person, rng):
    skin, wear = person.skin, person.wear
    line = mix(skin, INK, min(0.85, 0.55 + 0.35 * wear))
    for side in (-1, 1):
        pen.fill([(side * x, y) for x, y in ((0.9, -0.3), (1.1, -0.3), (1.16, 0.0), (1.0, 0.4), (0.9, 0.3))],
                 mix(skin, INK, 0.1), -0.1)
        if person.earrings:
            pen.dot((side * 1.08, 0.46), 0.11, (240, 210, 90), -0.1)
    outline = [(0, -1.3), (0.58, -1.2), (0.93, -0.7), (1.0, -0.1), (0.97, 0.35), (0.9 * person.jaw, 0.85),
               (0.45 * person.chin, 1.25), (0, 1.36)]
    pen.fill(mirror(outline), skin)
    side = rng.choice((-1, 1))  # the side away from the light
    pen.fill([(side * x, y) for x, y in outline] + [(side * 0.35, 0.9), (side * 0.6, 0.2), (side * 0.5, -0.6)],
             (*mix(skin, INK, 0.6), int(rng.uniform(10, 60))))
    if person.cheeks:
        for x in (-0.6, 0.6):
            pen.dot((x, 0.38), (0.2, 0.14), (230, 90, 90, 70))
    if person.freckles:
        for x, y in rng.normal((0, 0.3), (0.4, 0.07), (14, 2)):
            pen.dot((x, y), 0.025, mix(skin, (120, 60, 30), 0.6))
    # Age in lines: on the forehead, beside the eyes, under them, and from the nose to the mouth.
    for i in range(int(np.searchsorted((0.12, 0.34, 0.66), wear))):
        y, half = -0.52 - 0.13 * i, 0.5 - 0.05 * i
        pen.stroke([(-half, y + 0.03), (-half / 2, y - 0.02), (0, y + 0.02), (half / 2, y - 0.02), (half, y + 0.03)],
                   line, 0.05 + 0.04 * wear)
    for side in (-1, 1):
        for i in range(int(np.searchsorted((0.2, 0.5, 0.75), wear))):
            pen.stroke([(side * 0.68, -0.03 + 0.05 * i), (side * 0.88, -0.14 + 0.13 * i)], line, 0.05 + 0.03 * wear)
        if wear > 0.25:
            pen.stroke([(side * 0.24, 0.14), (side * 0.42, 0.2 + 0.04 * wear), (side * 0.62, 0.12)], line,
                       0.04 + 0.04 * wear)
            pen.stroke([(side * 0.22, 0.4), (side * 0.36, 0.58), (side * 0.4, 0.8)], line, 0.04 + 0.03 * wear)
        if wear > 0.7:
            pen.stroke([(side * 0.42, 0.95), (side * 0.5, 1.1), (side * 0.46, 1.2)], line, 0.04)


def draw_nose_and_mouth(pen, person, rng):
    skin, lips = person.skin, person.lips
    if person.beard:
        colour = mix(person.brow, person.hair, 0.4)
        colour = (*mix(skin, colour, 0.75), 110) if person.beard == 1 else colour
        pen.fill([(-0.97, 0.3), (-0.8, 0.6), (-0.4, 0.58), (0, 0.55), (0.4, 0.58), (0.8, 0.6), (0.97, 0.3),
                  (0.92 * person.jaw, 0.86), (0.47 * person.chin, 1.28), (0, 1.4), (-0.47 * person.chin, 1.28),
                  (-0.92 * person.jaw, 0.86)], colour)
    dark = mix(skin, INK, 0.42)
    side = rng.choice((-1, 1))
    pen.stroke([(side * 0.09, -0.02), (side * 0.12, 0.2), (side * 0.2, 0.4), (side * 0.1, 0.47)], dark, 0.06)
    pen.dot((0, 0.38), (0.13, 0.1), mix(skin, (255, 235, 220), 0.35))
    pen.stroke([(-0.2, 0.38), (-0.15, 0.47), (0, 0.5), (0.15, 0.47), (0.2, 0.38)], dark, 0.075)
    for x in (-0.09, 0.09):
        pen.dot((x, 0.46), (0.06, 0.04), mix(skin, INK, 0.85))
    smile, half, thick = rng.uniform(-0.04, 0.1), rng.uniform(0.3, 0.4), person.lip_height
    ends = [(-half, 0.8 - smile), (half, 0.8 - smile)]
    pen.fill([ends[0], (-0.12, 0.8 - thick), (0, 0.81 - thick * 0.8), (0.12, 0.8 - thick), ends[1],
              (0.15, 0.84 + thick), (-0.15, 0.84 + thick)], lips)
    if rng.random() < 0.35:
        pen.fill([(-half * 0.75, 0.79), (0, 0.78), (half * 0.75, 0.79), (0, 0.8 + thick)], (250, 246, 240))
    else:
        pen.stroke([ends[0], (0, 0.82), ends[1]], mix(lips, INK, 0.6), 0.035)


def draw_mask(pen, state, rng):
    """Worn: from the bridge of the nose to the chin. Wrongly: below the nose, or down at the chin."""
    chin = rng.random() < 0.5
    top, bottom, half = rng.uniform(0.1, 0.2), rng.uniform(1.42, 1.5), 0.94
    if state == 1:
        top, bottom, half = (rng.uniform(0.98, 1.04), 1.62, 0.74) if chin else (rng.uniform(0.62, 0.7), 1.48, 0.92)
    colour = jitter(rng, MASKS[rng.integers(5 if rng.random() < 0.5 else len(MASKS))], 8)
    dark, second = mix(colour, (40, 40, 60), 0.28), jitter(rng, MASKS[rng.integers(len(MASKS))], 20)
    xs = np.linspace(-half, half, 11)
    upper = top + 0.18 * xs**2 - 0.07 * np.exp(-((xs / 0.25) ** 2))
    lower = bottom - 0.56 * np.abs(xs) ** 2.2

    def across(share, inset=0.0):
        return np.stack([xs * (1 - inset), upper + (lower - upper) * share], axis=1)

    for side in (-1, 1):
        for share in (0.08, 0.85):
            x, y = across(share)[-1]
            pen.stroke([(side * x, y), (side * 1.04, 0.12)], dark, 0.03, 0.0 if half > 0.8 else 0.1)
    pen.fill(np.vstack([across(0), across(1)[::-1]]), colour, round_off=False)
    kind = rng.integers(5)
    if kind == 0:  # surgical: pleats
        for share in (0.28, 0.5, 0.72):
            pen.stroke(across(share, 0.04), dark, 0.03)
    elif kind == 1:  # folded in three, with a ridge
        pen.fill(np.vstack([across(0), across(0.33)[::-1]]), mix(colour, (255, 255, 255), 0.3), round_off=False)
        for share in (0.33, 0.7):
            pen.stroke(across(share), dark, 0.035)
    elif kind == 2:  # cloth: a seam in the middle
        pen.stroke([across(share)[5] for share in (0, 0.3, 0.6, 1)], dark, 0.035)
    elif kind == 3:  # dots
        for row, share in enumerate(np.arange(0.16, 0.95, 0.17)):
            for x, y in across(share, 0.1)[row % 2::2]:
                pen.dot((x, y), 0.055, second)
    else:  # stripes
        for share in (0.15, 0.45, 0.75):
            pen.fill(np.vstack([across(share), across(share + 0.14)[::-1]]), second, round_off=False)
    pen.stroke(across(0.02), dark, 0.035)
    pen.stroke(across(0.99), dark, 0.03)


def draw_eyes(pen, person):
    skin, eye, wear = person.skin, person.eye, person.wear
    droop = 0.05 * max(0.0, wear - 0.5)
    for side in (-1, 1):
        def at(x, y, side=side):
            return side * x, y
        if person.shadow:
            pen.dot(at(0.43, -0.08), (0.25, 0.13), (130, 50, 130, 150))
        h = 0.11 * eye
        pen.fill([at(0.2, 0.02), at(0.42, -h), at(0.65, -0.01 + droop), at(0.43, h * 0.8)], (248, 246, 242))
        pen.dot(at(0.43, 0.0), 0.1 * eye, person.iris)
        pen.dot(at(0.43, 0.0), 0.05, (12, 10, 12))
        pen.dot(at(0.46, -0.04), 0.025, (255, 255, 255))
        pen.stroke([at(0.18, 0.03), at(0.42, -h - 0.01), at(0.67, droop)], INK, 0.065 if person.lashes else 0.035)
        if person.lashes:
            pen.stroke([at(0.6, -0.05), at(0.78, -0.13)], INK, 0.055)
            pen.stroke([at(0.52, -0.09), at(0.62, -0.2)], INK, 0.04)
        if wear > 0.6:
            pen.stroke([at(0.2, -0.12), at(0.45, -0.17), at(0.7, -0.04)], mix(skin, INK, 0.45), 0.03)
        brow = [at(0.18, -0.29), at(0.48, -0.31 - person.brow_arch), at(0.74, -0.27)]
        pen.stroke(brow, person.brow, max(0.04, person.brow_weight))
    if person.glasses:
        for side in (-1, 1):
            ring = [(side * (0.43 + 0.29 * np.cos(a)), 0.01 + 0.23 * np.sin(a)) for a in np.linspace(0, 2 * np.pi, 13)]
            pen.stroke(ring, (40, 36, 40), 0.04)
            pen.stroke([(side * 0.71, -0.04), (side * 1.02, -0.1)], (40, 36, 40), 0.04)
        pen.stroke([(-0.15, -0.02), (0.15, -0.02)], (40, 36, 40), 0.04)


def draw_front_hair(pen, person, hat, rng):
    hair, line, top = person.hair, person.hairline, -1.42 - person.volume
    streak = mix(GREY[1] if person.streaks and person.wear > 0.2 else mix(hair, (255, 240, 220), 0.25), hair, 0.15)
    if person.front == "bald":
        for side in (-1, 1):
            ring = ((0.88, -0.75), (1.04, -0.6), (1.1, -0.1), (0.96, 0.0), (0.92, -0.35))
            pen.fill([(side * x, y) for x, y in ring], hair)
    else:
        cap = [(0, top), (0.7, top + 0.12), (1.08, -0.85), (1.07, -0.1), (0.95, -0.05), (0.9, -0.45)]
        right = {"fringe": [(0.72, -0.42), (0.4, -0.4), (0, -0.44)],
                 "part": [(0.8, -0.55), (0.5, -0.8), (0.25, line - 0.2)],
                 }.get(person.front, [(0.78, line + 0.12), (0.4, line), (0, line)])
        left = [(-0.3, -0.62), (-0.78, -0.36)] if person.front == "part" else [(-x, y) for x, y in right[-2::-1]]
        pen.fill(cap + right + left + [(-x, y) for x, y in cap[:0:-1]], hair, 0.1)
        if person.front == "quiff":
            lock = [(-0.8, -0.9), (-0.6, -1.5), (0.1, top - 0.28), (0.8, top - 0.1), (0.9, -0.95), (0.3, -0.85)]
            pen.fill(lock, hair, 0.2)
        if person.front == "curls":
            for a in np.linspace(-0.35, np.pi + 0.35, 13):
                pen.dot((1.05 * np.cos(a), -0.62 - (0.75 + person.volume) * np.sin(a)), 0.26, hair, 0.1)
        for x in (-0.7, -0.42, -0.1, 0.25, 0.55, 0.8):
            pen.stroke([(x * 0.7, top + 0.12), (x, -1.12), (x * 1.12, -0.92)], streak, 0.05, 0.2)
        if person.back in ("bob", "long"):
            end = 0.9 if person.back == "bob" else 1.9
            for side in (-1, 1):
                lock = ((0.86, -0.9), (1.15, -0.6), (1.32, end), (1.02, end + 0.1), (0.98, 0.1))
                pen.fill([(side * x, y) for x, y in lock], hair, 0)
    if hat:
        colour = jitter(rng, [rng.uniform(40, 220)] * 3, 45)
        shade = mix(colour, INK, 0.3)
        dome = [(0, -1.68), (0.75, -1.5), (1.12, -0.95), (1.12, -0.62), (0.6, -0.7), (0, -0.72)]
        pen.fill(mirror(dome), colour, 0.1)
        if rng.random() < 0.5:  # a cap with a peak, else a knitted one with a band
            pen.fill(mirror([(0, -0.86), (0.8, -0.82), (1.15, -0.6), (0.6, -0.6), (0, -0.56)]), shade, 0.3)
        else:
            pen.stroke([(-1.1, -0.72), (-0.5, -0.78), (0.5, -0.78), (1.1, -0.72)], shade, 0.2, 0.2)


def develop(photo, rng):
    """Light from one side, a colour cast, focus and sensor noise."""
    if rng.random() < 0.5:
        photo = photo.filter(ImageFilter.BoxBlur(rng.uniform(0.3, 1.2)))
    gain = rng.uniform(0.85, 1.1) * rng.normal(1, 0.035, 3)
    lift = rng.uniform(0, 16)
    table = [int(min(255, lift + value * g)) for g in gain for value in range(256)]
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35)
    y, x = np.mgrid[-1:1:4j, -1:1:3j]
    light = 255 * (1 - depth * (0.5 + 0.35 * (x * np.cos(angle) + y * np.sin(angle))))
    light = Image.fromarray(light.clip(0, 255).astype(np.uint8)).resize(photo.size, Image.Resampling.BILINEAR)
    photo = ImageChops.multiply(photo.point(table), Image.merge("RGB", [light] * 3))
    strength = rng.uniform(0.3, 1)
    noise = ImageChops.offset(noise_plate(), int(rng.integers(WIDTH)), int(rng.integers(HEIGHT)))
    noise = noise.point([int(round(128 + (value - 128) * strength)) for value in range(256)] * 3)
    return ImageChops.add(photo, noise, 1, -128)


@functools.cache
def noise_plate():
    noise = np.random.default_rng(0).normal(128, 6, (HEIGHT, WIDTH, 3))
    return Image.fromarray(noise.clip(0, 255).round().astype(np.uint8))
