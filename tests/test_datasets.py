"""Folders of images: what is taken, in which order, under which label, and what is refused."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualtoken_deploy.data.folders import IMAGE_SUFFIXES, PHOTOGRAPHS, WORDS, ImageSet, open_dataset
from dualtoken_deploy.data.images import load_image
from dualtoken_deploy.errors import DatasetError, MissingError, UsageError


def plant(folder: Path, *names: str) -> Path:
    """Empty files: a data set is named, not read."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_class_folders_in_sorted_order(tmp_path: Path) -> None:
    plant(tmp_path, "n02/b.JPEG", "n02/a.png", "n10/z.jpg", "n01/c.webp")
    found = open_dataset(tmp_path)
    assert found == ImageSet(
        name=str(tmp_path),
        images=tuple(tmp_path / name for name in ("n01/c.webp", "n02/a.png", "n02/b.JPEG", "n10/z.jpg")),
        labels=(0, 1, 1, 2),
        classes=("n01", "n02", "n10"),
    )
    assert len(found) == 4
    assert open_dataset(str(tmp_path)) == found


def test_order_does_not_depend_on_the_disk(tmp_path: Path) -> None:
    names = [f"{i:02}" for i in range(30)]
    plant(tmp_path, *(f"{name}/{file}.png" for name in names[::-1] for file in "cab"))
    found = open_dataset(tmp_path)
    assert found.classes == tuple(names)
    assert found.images == tuple(tmp_path / name / f"{file}.png" for name in names for file in "abc")


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    found = open_dataset(plant(tmp_path, "b.jpg", "a.png"))
    assert found.images == (tmp_path / "a.png", tmp_path / "b.jpg")
    assert (found.labels, found.classes) == (None, None)


@pytest.mark.parametrize("layout", ["", "cat/"])
def test_only_visible_pictures_are_taken(tmp_path: Path, layout: str) -> None:
    kept = [f"p{i}{suffix}" for i, suffix in enumerate(sorted(IMAGE_SUFFIXES))] + ["q.TIFF", "r.JPeG"]
    left = ["notes.txt", "Thumbs.db", ".hidden.jpg", "._p0.png", "jpg", "a.jpg.part"]
    plant(tmp_path, *(layout + name for name in kept + left))
    plant(tmp_path, ".cache/x.jpg", "README.md", "LICENSE", f"{layout}folder.png/notes.txt" if layout else ".x/y.png")
    assert [path.name for path in open_dataset(tmp_path).images] == sorted(kept)


def test_empty_folders_beside_loose_images_are_no_classes(tmp_path: Path) -> None:
    assert open_dataset(plant(tmp_path, "a.png", "notes/readme.txt")).labels is None


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ([], "holds no images"),
        (["notes.txt"], "holds no images"),
        (
            ["train/cat/a.jpg", "test/cat/b.jpg"],
            "holds no images .*; name one of its folders .test, train., or fill them",
        ),
        (["cat/a.jpg", "loose.jpg", "other.jpg"], r"mixes class folders with 2 loose images \(loose.jpg\)"),
        (["cat/a.jpg", "dog/readme.txt", "eel/b.jpg"], "class folders without images: dog; fill or remove"),
    ],
)
def test_layouts_that_are_refused(tmp_path: Path, names: list[str], match: str) -> None:
    with pytest.raises(DatasetError, match=match) as caught:
        open_dataset(plant(tmp_path, *names))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no folder at .*gone; give a folder of images, or one of: .*photographs"):
        open_dataset(tmp_path / "gone")
    with pytest.raises(DatasetError, match=r"a\.png is a file; give a folder"):
        open_dataset(plant(tmp_path, "a.png") / "a.png")
    with pytest.raises(DatasetError, match="cannot be read"):
        open_dataset(tmp_path / ("n" * 300))


def test_a_word_can_still_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, "photographs/mine.jpg")
    monkeypatch.chdir(tmp_path)
    assert open_dataset(Path("photographs")).images == (Path("photographs/mine.jpg"),)
    assert open_dataset("./photographs").images == (Path("photographs/mine.jpg"),)
    assert len(open_dataset("photographs")) == len(PHOTOGRAPHS)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 400))
def test_limit_spreads_evenly(per_class: list[int], count: int) -> None:
    labels = tuple(label for label, size in enumerate(per_class) for _ in range(size))
    images = tuple(Path(f"{i}.png") for i in range(len(labels)))
    whole = ImageSet("made", images, labels, tuple(f"c{i}" for i in range(len(per_class))))
    part = whole.limit(count)
    assert part.labels is not None
    assert len(part) == len(part.labels) == min(count, len(images))
    assert part.classes == whole.classes
    assert part == whole.limit(count)
    kept = [images.index(path) for path in part.images]
    assert kept == sorted(set(kept))
    assert [labels[i] for i in kept] == list(part.labels)
    taken = Counter(part.labels)
    for label, size in enumerate(per_class):  # a class keeps its share, to within one image
        assert abs(taken[label] - size * len(part) / len(images)) < 1


def test_limit_without_labels(tmp_path: Path) -> None:
    found = open_dataset(plant(tmp_path, *(f"{i}.png" for i in range(10))))
    assert [path.name for path in found.limit(3).images] == ["0.png", "3.png", "6.png"]
    assert found.limit(10) == found.limit(11) == found
    for count in (0, -1):
        with pytest.raises(UsageError, match=f"limit of {count} images"):
            found.limit(count)


def test_a_set_that_does_not_add_up_is_refused() -> None:
    one = (Path("a.png"),)
    with pytest.raises(DatasetError, match="2 labels for 1 images"):
        ImageSet("made", one, (0, 1), ("c",))
    with pytest.raises(DatasetError, match="labels without classes"):
        ImageSet("made", one, (0,))


def test_photographs_are_there_and_can_be_read() -> None:
    found = open_dataset("photographs")
    assert {"astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "camera.png", "moon.png"} <= {
        path.name for path in found.images
    }
    assert (found.name, found.labels) == ("photographs", None)
    assert len(found) >= 14
    for path in found.images:
        image = load_image(path)
        assert min(image.shape[:2]) >= 150
        assert image.std() > 5


def test_photographs_do_not_import_skimage() -> None:
    program = (
        "import sys; from dualtoken_deploy.data.folders import open_dataset; open_dataset('photographs');"
        "assert not {'skimage', 'torch', 'PIL'} & set(sys.modules), sys.modules.keys()"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, cwd=root)


def test_photographs_without_skimage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"photographs needs the extra \[export\]; run: pip install"):
        open_dataset("photographs")


def test_photographs_of_another_skimage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualtoken_deploy.data.folders.PHOTOGRAPHS", ("camera.png", "never.png"))
    with pytest.raises(DatasetError, match=r"lacks never\.png"):
        open_dataset("photographs")


def test_words_are_not_paths() -> None:
    assert "photographs" in WORDS
    assert all(word.isidentifier() for word in WORDS)


def test_a_folder_with_train_and_val_gives_the_part(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 1)):
        (tmp_path / part / "cat").mkdir(parents=True)
        for i in range(count):
            (tmp_path / part / "cat" / f"{i}.jpg").touch()
    assert [len(open_dataset(tmp_path, part)) for part in ("train", "val")] == [3, 1]
    assert len(open_dataset(tmp_path)) == 1
