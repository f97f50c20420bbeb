"""The encoder under the detector is the model's own, at another size, with windows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mammut.detection.config import DetectorConfig
from mammut.detection.trunk import resized_positions, trunk_maps
from mammut.model import Mammut

Config = Callable[..., DetectorConfig]
Model = Callable[[str], Mammut]


def test_at_the_models_size_it_is_the_model(dialect: str, make_config: Config, make_model: Model) -> None:
    model = make_model(dialect)
    config = make_config(image_size=32, strides=(16,), taps=(0, 1), proposals=4)
    pixels = torch.randn(2, 3, 32, 32)
    positions = resized_positions(model.vision.positions, model.vision, config)
    *taps, last = trunk_maps(model.vision, config, positions, pixels)
    tokens, _ = model.vision(pixels)
    first = int(model.config.vision.class_token)
    torch.testing.assert_close(last, tokens[:, first:])
    assert len(taps) == 2
    assert not torch.allclose(taps[0], taps[1])


def test_a_window_is_a_picture_of_its_own(make_config: Config, make_model: Model) -> None:
    """With the positions repeated, windows of the model's own size see what the model sees of each quarter."""
    model = make_model("paper")
    config = make_config(window=2, global_layers=())
    pixels = torch.randn(1, 3, 64, 64)
    positions = model.vision.positions.reshape(2, 2, -1).repeat(2, 2, 1).reshape(16, -1)
    last = trunk_maps(model.vision, config, positions, pixels)[-1].reshape(4, 4, -1)
    for top in (0, 1):
        for left in (0, 1):
            quarter = pixels[:, :, 32 * top : 32 * top + 32, 32 * left : 32 * left + 32]
            tokens, _ = model.vision(quarter)
            own = last[2 * top : 2 * top + 2, 2 * left : 2 * left + 2].reshape(4, -1)
            torch.testing.assert_close(own, tokens[0], atol=1e-5, rtol=1e-4)


def test_a_global_layer_sees_everything(dialect: str, make_config: Config, make_model: Model) -> None:
    """What changes in one corner reaches the other only where a block attends everywhere."""
    model = make_model(dialect)
    pixels = torch.randn(1, 3, 64, 64)
    changed = pixels.clone()
    changed[:, :, :16, :16] += 1
    for layers, reaches in (((), dialect == "openmammut"), ((1,), True)):  # a class token goes from window to window
        config = make_config(window=2, global_layers=layers)
        positions = resized_positions(model.vision.positions, model.vision, config)
        far = [trunk_maps(model.vision, config, positions, each)[-1][0, -1] for each in (pixels, changed)]
        assert torch.allclose(far[0], far[1], atol=1e-6) != reaches


def test_one_window_is_no_window(dialect: str, make_config: Config, make_model: Model) -> None:
    model = make_model(dialect)
    pixels = torch.randn(2, 3, 64, 64)
    found = []
    for window in (0, 4):
        config = make_config(window=window)
        positions = resized_positions(model.vision.positions, model.vision, config)
        found.append(trunk_maps(model.vision, config, positions, pixels)[-1])
    torch.testing.assert_close(found[0], found[1])


def test_positions_keep_the_class_token(make_config: Config, make_model: Model) -> None:
    model = make_model("openmammut")
    positions = resized_positions(model.vision.positions, model.vision, make_config())
    assert positions.shape == (17, 32)
    torch.testing.assert_close(positions[0], model.vision.positions[0])


def test_weights_are_shared(make_config: Config, make_model: Model) -> None:
    model = make_model("paper")
    config = make_config()
    positions = resized_positions(model.vision.positions, model.vision, config)
    pixels = torch.randn(1, 3, 64, 64)
    before = trunk_maps(model.vision, config, positions, pixels)[-1]
    with torch.no_grad():
        model.get_parameter("vision.blocks.0.out.weight").zero_()
    assert not torch.allclose(before, trunk_maps(model.vision, config, positions, pixels)[-1])
