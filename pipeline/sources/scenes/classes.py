"""What a scene is made of: object classes with two colours and a texture each, and stuff to stand on or in.

The objects' names are words of CC4M's entity set. Source: OVSegmentor, supplementary "entity set". Hue, texture and
outline all tell the classes apart, so that a small model learns the names in minutes. RGB colours in [0, 255].
"""

from dataclasses import dataclass

from pipeline.sources.scenes import living, things
from pipeline.sources.scenes.shapes import Pose

RGB = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectClass:
    """Colours are RGB in [0, 255]; What `flies` is drawn high where there is sky."""

    name: str
    colour: str
    body: RGB
    accent: RGB
    texture: str
    flies: bool
    verbs: tuple[str, ...]
    poses: tuple[Pose, ...]
    dark: RGB = (40, 36, 44)
    light: RGB = (255, 248, 214)


OBJECTS = (
    ObjectClass(
        name="dog",
        colour="brown",
        body=(150, 92, 40),
        accent=(240, 220, 184),
        texture="spots",
        flies=False,
        verbs=("running", "playing", "waiting"),
        poses=living.dog(),
    ),
    ObjectClass(
        name="cat",
        colour="black",
        body=(58, 52, 62),
        accent=(244, 240, 240),
        texture="stripes",
        flies=False,
        verbs=("sitting", "sleeping", "looking around"),
        poses=living.cat(),
    ),
    ObjectClass(
        name="bird",
        colour="blue",
        body=(40, 78, 214),
        accent=(255, 196, 44),
        texture="scales",
        flies=True,
        verbs=("singing", "flying", "resting"),
        poses=living.bird(),
    ),
    ObjectClass(
        name="car",
        colour="red",
        body=(216, 30, 40),
        accent=(176, 222, 240),
        texture="gloss",
        flies=False,
        verbs=("driving", "parked", "speeding"),
        poses=things.car(),
    ),
    ObjectClass(
        name="bus",
        colour="yellow",
        body=(250, 206, 20),
        accent=(64, 70, 92),
        texture="bands",
        flies=False,
        verbs=("stopping", "parked", "waiting"),
        poses=things.bus(),
    ),
    ObjectClass(
        name="boat",
        colour="white",
        body=(28, 42, 104),
        accent=(250, 250, 246),
        texture="planks",
        flies=False,
        verbs=("sailing", "floating", "drifting"),
        poses=things.boat(),
    ),
    ObjectClass(
        name="house",
        colour="brick",
        body=(208, 112, 88),  # far from sand, which is what pale walls were taken for
        accent=(62, 76, 98),
        texture="bricks",
        flies=False,
        verbs=("standing", "waiting for new owners"),
        poses=things.house(),
    ),
    ObjectClass(
        name="ball",
        colour="orange",
        body=(250, 122, 22),
        accent=(255, 244, 226),
        texture="plain",
        flies=False,
        verbs=("bouncing", "rolling"),
        poses=things.ball(),
    ),
    ObjectClass(
        name="kite",
        colour="green",
        body=(150, 226, 30),
        accent=(222, 30, 170),
        texture="checks",
        flies=True,
        verbs=("flying", "soaring"),
        poses=things.kite(),
    ),
    ObjectClass(
        name="flower",
        colour="pink",
        body=(255, 116, 178),
        accent=(255, 222, 60),
        texture="petals",
        flies=False,
        verbs=("blooming", "growing"),
        poses=living.flower(),
        dark=(38, 122, 52),
    ),
    ObjectClass(
        name="cup",
        colour="turquoise",
        body=(22, 186, 168),
        accent=(246, 250, 250),
        texture="dots",
        flies=False,
        verbs=("standing", "steaming"),
        poses=things.cup(),
    ),
    ObjectClass(
        name="umbrella",
        colour="purple",
        body=(122, 40, 186),
        accent=(206, 160, 240),
        texture="gloss",
        flies=False,
        verbs=("opening", "lying"),
        poses=things.umbrella(),
    ),
)
"""The object classes in label order: class i of a label map is OBJECTS[i - 1]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stuff:
    """A background: it is labelled 0, but captions name it. `above` may fill the upper part of a scene."""

    name: str
    phrases: tuple[str, ...]
    colours: tuple[RGB, ...]
    texture: str
    above: bool = False


BACKGROUNDS = (
    Stuff(
        name="grass",
        phrases=("on the grass", "in the grass", "on green grass"),
        colours=((124, 164, 88), (142, 170, 92), (104, 150, 90)),
        texture="blades",
    ),
    Stuff(
        name="sky",
        phrases=("under a clear sky", "against the sky", "under the sky"),
        colours=((168, 206, 238), (186, 214, 236), (204, 206, 226)),
        texture="clouds",
        above=True,
    ),
    Stuff(
        name="sand",
        phrases=("on the sand", "in the sand"),
        colours=((228, 208, 164), (220, 196, 152), (234, 216, 182)),
        texture="grains",
    ),
    Stuff(
        name="water",
        phrases=("on the water", "in the water", "by the water"),
        colours=((92, 158, 182), (84, 146, 186), (112, 172, 182)),
        texture="waves",
    ),
    Stuff(
        name="road",
        phrases=("on the road", "by the road"),
        colours=((136, 136, 142), (122, 124, 128), (150, 148, 146)),
        texture="grains",
    ),
    Stuff(
        name="snow",
        phrases=("in the snow", "on fresh snow"),
        colours=((226, 232, 240), (214, 224, 236), (232, 234, 236)),
        texture="clouds",
        above=True,
    ),
)
"""All of it is class 0 of a label map."""

CLASSES = ("background", *(kind.name for kind in OBJECTS))
STUFF = tuple(kind.name for kind in BACKGROUNDS)
