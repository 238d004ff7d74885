"""Training: the paper's recipe on folders of images or on the sets that need no download."""

from dualtoken_deploy.models.registry import parse_image_size as image_size
from dualtoken_deploy.train.config import TrainConfig, make_config
from dualtoken_deploy.train.loop import resume, train

__all__ = ["TrainConfig", "image_size", "make_config", "resume", "train"]
