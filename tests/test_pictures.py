"""python -m pytest tests/test_pictures.py"""

import numpy as np
import torch
from PIL import Image

from analysis import theme
from trainables.pictures import (
    GAP,
    HEAT,
    class_colour,
    middle_slice,
    save_masks,
    save_reconstruction,
    save_segmentation,
)


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


def test_of_volumes_the_middle_slice_of_the_first_axis_is_drawn(tmp_path):
    images = torch.zeros(1, 1, 3, 128, 160)
    images[:, :, 1] = 0.2
    hidden = torch.zeros(1, 3, 128, 160, dtype=torch.bool)
    hidden[:, 1, :64] = True
    labels = torch.full((1, 3, 128, 160), 255)
    labels[:, 1] = 1
    assert torch.equal(middle_slice(images), images[:, :, 1])
    save_reconstruction(tmp_path / "r.png", images, hidden, torch.ones_like(images))
    save_segmentation(tmp_path / "s.png", images, labels, labels)
    save_masks(tmp_path / "m.png", images, hidden, hidden.float(), labels)
    left, middle = 0, 160 + GAP
    grid = read(tmp_path / "r.png")
    assert grid.shape == (128, 3 * 160 + 2 * GAP, 3)
    assert [grid[0, x, 0] for x in (left, middle, 2 * middle)] == [51, 128, 255]
    assert [grid[127, x, 0] for x in (left, middle, 2 * middle)] == [51, 51, 51]
    assert read(tmp_path / "s.png")[0, middle].tolist() == list(class_colour(1))
    drawn = read(tmp_path / "m.png")
    assert drawn[0, middle].tolist() == list(class_colour(1))
    assert [drawn[y, 2 * middle, 0] for y in (0, 127)] == [128, 51]


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


def test_masks_show_one_draw_in_grey_and_how_often_as_heat_over_the_image(tmp_path):
    images = torch.full((1, 1, 128, 128), 0.4)  # 102, in eight levels of grey 96
    hidden = torch.zeros(1, 128, 128, dtype=torch.bool)
    hidden[:, :64] = True
    often = torch.zeros(1, 128, 128)
    often[:, 32:64], often[:, 64:96], often[:, 96:] = 0.2, 0.5, 1.0
    columns = save_masks(tmp_path / "m.png", images, hidden, often)
    assert columns == ["image", "hidden in one draw", "how often hidden"]
    grid = read(tmp_path / "m.png")
    assert grid.shape == (128, 3 * 128 + 2 * GAP, 3)
    assert (grid[:, :128] == 102).all()
    assert [grid[y, 128 + GAP].tolist() for y in (0, 127)] == [[128] * 3, [102] * 3]
    heat = [grid[y, 2 * (128 + GAP)].tolist() for y in (0, 32, 64, 96)]
    # four parts of the colour and one of the grey; at 0.5 (128 of 255) between the middle two
    assert heat == [
        [19, (4 * 32 + 96) // 5, (4 * 77 + 96) // 5],
        [(4 * 49 + 96) // 5, (4 * 68 + 96) // 5, (4 * 107 + 96) // 5],
        [(4 * 126 + 96) // 5, (4 * 124 + 96) // 5, (4 * 116 + 96) // 5],
        [(4 * 255 + 96) // 5, (4 * 234 + 96) // 5, (4 * 70 + 96) // 5],
    ]


def test_a_share_has_the_same_colour_whatever_else_the_picture_holds(tmp_path):
    images, hidden = torch.zeros(1, 1, 128, 128), torch.zeros(1, 128, 128, dtype=torch.bool)
    shown = []
    for others in (0.0, 1.0):
        often = torch.full((1, 128, 128), others)
        often[:, 0] = 0.6
        save_masks(tmp_path / "m.png", images, hidden, often)
        shown.append(read(tmp_path / "m.png")[0, -1].tolist())
    assert shown[0] == shown[1] == [149 * 4 // 5, 143 * 4 // 5, 120 * 4 // 5]


def test_masks_show_the_classes_where_they_are_known(tmp_path):
    images, hidden = torch.full((1, 1, 4, 4), 0.4), torch.zeros(1, 4, 4, dtype=torch.bool)
    classes = torch.zeros(1, 4, 4, dtype=torch.long)
    classes[0, 0, 0], classes[0, 0, 1] = 2, 255
    columns = save_masks(tmp_path / "m.png", images, hidden, hidden.float(), classes)
    assert columns == ["image", "classes", "hidden in one draw", "how often hidden"]
    grid = read(tmp_path / "m.png")
    assert [grid[0, 128 + GAP + x].tolist() for x in (0, 32, 64)] == [
        list(class_colour(2)),
        [160] * 3,
        [51] * 3,
    ]


def test_heat_is_lighter_the_more_often_and_as_the_pages_legends_show_it():
    lightness = [0.2126 * red + 0.7152 * green + 0.0722 * blue for red, green, blue in HEAT]
    assert lightness == sorted(lightness)
    legend = [tuple(bytes.fromhex(colour[1:])) for _, colour in theme.SCALE]
    assert legend == list(HEAT)
