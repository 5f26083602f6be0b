"""What raters are asked: the questionnaire of the paper's Appendix D, and the preferences of its user study."""

from typing import NamedTuple


class Item(NamedTuple):
    """A statement about one video, from 1 (strongly disagree) to 5 (strongly agree)."""

    name: str
    title: str
    statement: str


class Group(NamedTuple):
    """A dimension of the questionnaire. Raters also choose the video that is best in it."""

    name: str
    title: str
    about: str
    items: tuple[Item, ...]


GROUPS = (
    Group(
        "text", "Text alignment", "How well the video matches the meaning of the prompt.",
        (
            Item("object_class", "Object class accuracy",
                 "The objects in the video correctly match the categories described in the prompt."),
            Item("multiple_objects", "Multiple objects handling",
                 "The video correctly represents and maintains multiple objects without confusion or merging."),
            Item("color", "Color accuracy",
                 "The colors in the video are accurate, stable, and consistent with the expected appearance."),
            Item("spatial_relationship", "Spatial relationship",
                 "The spatial relationships between objects (e.g., relative positions, sizes) are logical and "
                 "consistent."),
            Item("scene", "Scene coherence",
                 "The video presents a coherent and believable scene that aligns with the prompt."),
            Item("appearance_style", "Appearance style consistency",
                 "The appearance style (e.g., realistic, cartoon, cinematic) matches the intended style and remains "
                 "stable."),
        ),
    ),
    Group(
        "motion", "Motion quality", "How real, stable and smooth the motion is.",
        (
            Item("temporal_flickering", "Temporal flickering",
                 "The video shows minimal flickering or frame-to-frame jitter."),
            Item("motion_smoothness", "Motion smoothness",
                 "Movements in the video appear smooth and natural without abrupt jumps."),
            Item("dynamic_degree", "Dynamic degree",
                 "The video presents an appropriate level of dynamics that matches the scene and prompt."),
            Item("temporal_style", "Temporal style consistency",
                 "The stylistic elements of the video remain consistent across time."),
            Item("overall_consistency", "Overall consistency",
                 "The video maintains overall coherence and consistency across all frames."),
        ),
    ),
    Group(
        "visual", "Visual quality", "How clear, pleasing and consistent the frames are.",
        (
            Item("subject_consistency", "Subject consistency",
                 "The main subject remains visually consistent throughout the video."),
            Item("background_consistency", "Background consistency",
                 "The background stays stable and does not exhibit unexpected changes across frames."),
            Item("aesthetic_quality", "Aesthetic quality",
                 "The overall artistic and aesthetic quality of the video is appealing."),
            Item("imaging_quality", "Imaging quality",
                 "The video appears clear, sharp, and free from noticeable visual artifacts."),
        ),
    ),
)  # fmt: skip
ITEMS = tuple(item for group in GROUPS for item in group.items)
SCALE = ("Strongly disagree", "Disagree", "Neutral", "Agree", "Strongly agree")
OVERALL = "overall"
# Name -> title of what is asked about all videos of a prompt: which one is best.
QUESTIONS = {group.name: group.title for group in GROUPS} | {OVERALL: "Overall"}
