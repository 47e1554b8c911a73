"""Generated captioned pictures with exact masks: what the chain learns from where there is no network."""

from pipeline.sources.scenes.classes import CLASSES, STUFF
from pipeline.sources.scenes.drawing import generate
from pipeline.sources.scenes.scene import BORDER, Placed, Scene, SceneConfig

__all__ = ["BORDER", "CLASSES", "STUFF", "Placed", "Scene", "SceneConfig", "generate"]
