"""python -m pytest tests/test_pictures.py"""

import numpy as np
import torch
from PIL import Image

from trainables.pictures import GAP, class_colour, save_reconstruction, save_segmentation


def read(path):
    picture = Image.open(path)
    assert picture.format == "PNG" and picture.mode == "RGB"
    return np.asarray(picture)


def test_a_reconstruction_shows_image_hidden_regions_and_pasted_prediction(tmp_path):
    images = torch.full((2, 1, 128, 128), 0.2)
    hidden = torch.zeros(2, 128, 128, dtype=torch.bool)
    hidden[:, :64] = True
    path = tmp_path / "pictures" / "reconstruction.png"
    save_reconstruction(path, images, hidden, torch.full_like(images, 1.7))
    grid = read(path)
    assert grid.shape == (2 * 128 + GAP, 3 * 128 + 2 * GAP, 3)
    top, bottom = grid[0], grid[127]
    columns = [0, 128 + GAP, 2 * (128 + GAP)]
    assert [top[x].tolist() for x in columns] == [[51] * 3, [128] * 3, [255] * 3]
    assert [bottom[x].tolist() for x in columns] == [[51] * 3] * 3
    assert (grid[128 : 128 + GAP] == 255).all()
    assert [entry.name for entry in path.parent.iterdir()] == ["reconstruction.png"]


def test_a_segmentation_shows_fixed_colours_over_the_dimmed_image(tmp_path):
    images = torch.full((1, 3, 2, 4), 0.4)
    truth = torch.tensor([[[0, 1, 2, 255], [0, 0, 0, 0]]])
    save_segmentation(tmp_path / "s.png", images, truth, torch.zeros_like(truth))
    grid = read(tmp_path / "s.png")
    assert grid.shape == (128, 3 * 256 + 2 * GAP, 3)  # enlarged 64 times
    shown = [grid[0, 256 + GAP + 64 * x].tolist() for x in range(4)]
    assert shown == [[51] * 3, list(class_colour(1)), list(class_colour(2)), [160] * 3]
    assert (grid[:, 2 * (256 + GAP) :] == 51).all()


def test_more_than_three_channels_show_the_first_three(tmp_path):
    images = torch.zeros(1, 5, 128, 128)
    images[:, :3] = torch.tensor([1.0, 0.0, 0.6]).view(1, 3, 1, 1)
    images[:, 3:] = 0.9
    labels = torch.zeros(1, 128, 128, dtype=torch.long)
    save_segmentation(tmp_path / "five.png", images, labels, labels)
    save_segmentation(tmp_path / "two.png", images[:, :2], labels, labels)
    assert read(tmp_path / "five.png")[0, 0].tolist() == [255, 0, 153]
    assert read(tmp_path / "two.png")[0, 0].tolist() == [255, 0, 0]


def test_the_first_twenty_classes_differ_in_colour():
    colours = [class_colour(label) for label in range(1, 21)]
    assert len(set(colours)) == 20
    assert class_colour(8) == tuple(value // 2 for value in class_colour(1))
