"""Films and strips show what moved and can be read back; what cannot be drawn is refused before it is
played.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.data.figures import render


def no_graphics():
    """Why MuJoCo cannot draw on this machine; "" if it can."""
    try:
        render.graphics()
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def graphics():
    """Skips where MuJoCo cannot draw."""
    if reason := no_graphics():
        pytest.skip(reason)


needs_graphics = pytest.mark.usefixtures("graphics")


def run(out, env, **settings):
    render.main(render.Args(env=env, out=out, **settings))
    return out


def write_policy(path, obs, actions, bias=0.0, **noise):
    policy.save(path, policy.mlp([(np.zeros((obs, actions)), np.full(actions, bias))], **noise))
    return str(path)


def changed(a, b):
    """Share of pixels that differ visibly."""
    return (np.abs(a.astype(int) - b).max(-1) > 12).mean()


def near(picture, color, tolerance=12):
    return (np.abs(picture.astype(int) - color).max(-1) <= tolerance).mean()


def test_a_strip_of_a_maze_shows_the_point_on_its_way(tmp_path):
    actor = write_policy(tmp_path / "p.npz", 4, 2, 1.0)
    out = run(tmp_path / "strip.png", "maze2d-large", policy=actor, frames=3, width=120, episodes=2)
    strip = np.asarray(Image.open(out))
    height = render.fitting_height(envs.make("maze2d-large"), 120)
    assert strip.shape == (2 * height + render.GAP, 3 * 120 + 2 * render.GAP, 3)
    assert height > 120  # the map is higher than wide
    assert (strip[height : height + render.GAP] == 255).all()
    for row in (strip[:height], strip[-height:]):
        first, _, last = (row[:, c * (120 + render.GAP) :][:, :120] for c in range(3))
        assert near(first, (0xC3, 0xC9, 0xD1)) > 0.3, "the walls are filled"
        assert near(first, (0xF0, 0xE4, 0x42)) > 0.002, "the goal is there"
        assert 0.001 < changed(first, last) < 0.2, "the point and its way, and nothing else"
    assert changed(strip[:height, :120], strip[-height:, :120]) > 0, "each episode has a start of its own"


def test_the_toy_maze_whose_state_is_more_than_a_place_is_drawn_too():
    env = envs.make("toy-maze", horizon=6)
    pictures = list(render.frames(env, None, jax.random.PRNGKey(0), width=72, height=64))
    assert len(pictures) == 7 and changed(pictures[0], pictures[-1]) > 0
    (track,) = render.play(env, None, jax.random.PRNGKey(0))
    x0, x1, y0, y1 = env.layout["bounds"]
    assert (track.places >= [x0, y0]).all() and (track.places <= [x1, y1]).all()


def test_the_point_is_drawn_where_it_is():
    env = envs.make("point-mass-wall")
    x0, x1, y0, y1 = env.layout["bounds"]
    spots = np.array([[0.2, 0.3], [0.9, 1.2]])
    for place, picture in zip(spots, render.draw_map(env, render.Track(spots, None), [0, 1], 300, 340)):
        column, row = (place[0] - x0) / (x1 - x0) * 300, (y1 - place[1]) / (y1 - y0) * 340
        around = picture[int(row) - 1 : int(row) + 2, int(column) - 1 : int(column) + 2]
        assert near(around, (0xD5, 0x5E, 0x00)) == 1


def test_a_track_ends_with_its_episode():
    env = envs.make("point-mass-wall")

    def under_the_wall(obs, key):
        down_then_right = jnp.where(obs[1] > 0.05, jnp.array([0.0, -1.0]), jnp.array([1.0, 0.0]))
        return jnp.where(obs[0] < 0.6, down_then_right, 20 * (jnp.array([1.0, 0.15]) - obs))

    tracks = render.play(env, under_the_wall, jax.random.PRNGKey(0), episodes=2)
    for track in tracks:
        assert 20 < len(track.places) < 80
        distance = np.linalg.norm(track.places - [1.0, 0.15], axis=1)
        assert distance[-1] < env.goal_radius and (distance[:-1] >= env.goal_radius).all()
    assert len(render.play(env, None, jax.random.PRNGKey(0), steps=7)[0].places) == 8


@needs_graphics
def test_a_body_moves_over_the_floor():
    env = envs.make("halfcheetah", "mujoco")
    pictures = render.frames(env, None, jax.random.PRNGKey(0), width=160, steps=20)
    assert pictures.shape == (21, 120, 160, 3) and pictures.dtype == np.uint8
    assert changed(pictures[0], pictures[10]) > 0.01 and changed(pictures[10], pictures[20]) > 0.01
    # The body deep under the floor, the camera where it was.
    empty = render.Track(np.array([[0.0, -50.0, *np.zeros(7)]]), None)
    (floor,) = render.draw(env, empty, [0], 160, 120, "free")
    (body,) = render.draw(env, render.Track(0 * empty.places, None), [0], 160, 120, "free")
    assert 0.005 < changed(floor, body) < 0.3


@needs_graphics
def test_an_ant_its_goal_and_its_way_are_seen_in_the_maze():
    env = envs.make("antmaze-umaze", "mujoco")
    (track,) = render.play(env, None, jax.random.PRNGKey(0), steps=1)
    places = np.repeat(track.places[:1], 30, axis=0)
    places[:, 0] += np.linspace(0, 8, 30)
    first, last = render.draw(env, track._replace(places=places), [0, 29], 240, 240)
    red, green, blue = np.moveaxis(first.astype(int), -1, 0)
    assert np.mean((green > 1.5 * red) & (green > 1.3 * blue)) > 5e-4, "the goal is green"
    assert np.mean((red > 1.2 * green) & (green > 1.2 * blue)) > 0.3, "the walls are brown"
    assert 0.002 < changed(first, last) < 0.1
    red, green, blue = np.moveaxis(last.astype(int), -1, 0)
    assert np.mean((red > 2 * green) & (red > 100)) > 1e-3, "the way is red"
    tracked = list(render.draw(env, track._replace(places=places), [0, 29], 240, 240, "track"))
    assert changed(*tracked) > 0.1, "the camera goes along"


@pytest.fixture(scope="module")
def once():
    """`render.play`, which makes equal episodes once, as compiling takes the most time."""
    play, made = render.play, {}

    def cached(env, actor, key, episodes, steps):
        asked = type(env), tuple(np.asarray(key)), episodes, steps
        if asked not in made:
            made[asked] = play(env, actor, key, episodes, steps)
        return made[asked]

    return cached


@needs_graphics
@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_films_are_read_back_with_all_their_frames(tmp_path, monkeypatch, once, suffix):
    if suffix == "mp4":
        pytest.importorskip("imageio_ffmpeg", reason="ffmpeg is not installed")
    monkeypatch.setattr(render, "play", once)
    size = {"width": 96, "height": 64, "fps": 10}
    out = run(
        tmp_path / f"film.{suffix}", "halfcheetah-sparse", steps=8, episodes=2, physics="mujoco", **size
    )
    if suffix == "mp4":
        reader = pytest.importorskip("imageio.v2").get_reader(out)
        read = np.stack([frame for frame in reader])  # noqa: C416 (its length is infinity, which list() would ask for)
    else:
        frames = ImageSequence.Iterator(Image.open(out))
        read = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    assert read.shape == (18, 64, 96, 3)  # two starts and twice eight steps
    assert changed(read[0], read[8]) > 0.005
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name], "nothing is left behind"


@pytest.mark.parametrize(
    ("name", "fps", "stride"),
    [("hopper", 25, 5), ("halfcheetah", 20, 1), ("antmaze-umaze", 10, 1), ("maze2d-open", 25, 4)],
)
def test_real_time_leaves_out_steps(name, fps, stride):
    track = render.Track(np.zeros((101, 2)), None)
    for asked, expected in ((0.0, (fps, stride)), (7.0, (7, 1))):
        args = render.Args(name, pathlib.Path("film.gif"), fps=asked)
        (which,), rate = render.choose(envs.make(name), args, [track])
        assert (rate, which.step) == (pytest.approx(expected[0]), expected[1])


def test_a_policy_acts_by_its_mean_or_by_samples(tmp_path):
    path = write_policy(tmp_path / "p.npz", 2, 2, 0.3, log_std=np.full(2, -1.0))
    env, obs, key = envs.make("point-mass-wall"), jnp.zeros(2), jax.random.PRNGKey(0)
    mean, sampled = (render.load_actor(path, env, "point-mass-wall", sample) for sample in (False, True))
    np.testing.assert_allclose(mean(obs, key), np.tanh([0.3, 0.3]), rtol=1e-5)
    assert np.abs(sampled(obs, key) - mean(obs, key)).max() > 0.01
    assert render.load_actor("", env, "point-mass-wall", False) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": "point-mass-wal"}, "unknown environment 'point-mass-wal'; did you mean point-mass-wall"),
        ({"env": "probe-match-obs"}, "nothing to draw"),
        ({"physics": "mjx"}, "uses no physics engine"),
        ({"out": "film.avi"}, r"film\.avi: its name must end in \.mp4, \.gif or \.png"),
        ({"out": "absent/film.gif"}, r"absent/film\.gif: must be a file in a folder that exists"),
        ({"policy": "absent.npz"}, r"absent\.npz: there is no such file"),
        ({"policy": "ant.npz"}, r"has 2 observations and 2 actions, but .*ant\.npz takes 27 and gives 8"),
        ({"policy": "mean.npz", "sample": True}, "no standard deviation"),
        ({"episodes": 0}, "--episodes must be at least 1, not 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"fps": float("inf")}, "--fps must be"),
        ({"frames": 0}, "--frames must be at least 1"),
        ({"width": 101}, "--width must be an even number"),
        ({"width": 0}, "--width must be an even number"),
        ({"height": 8}, "--height must be an even number"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_is_played(tmp_path, monkeypatch, settings, message):
    write_policy(tmp_path / "ant.npz", 27, 8)
    write_policy(tmp_path / "mean.npz", 2, 2)
    monkeypatch.setattr(render, "play", lambda *_: pytest.fail("something was played"))
    settings = {"env": "point-mass-wall", "out": "film.gif", **settings}
    if settings.get("policy"):
        settings["policy"] = str(tmp_path / settings["policy"])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        run(tmp_path / settings.pop("out"), **settings)
    assert sorted(tmp_path.iterdir()) == before


def test_a_film_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "film.gif").write_bytes(b"an older film")

    def torn(*_):
        yield np.zeros((16, 16, 3), np.uint8)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render, "draw", torn)
    with pytest.raises(ValueError, match=r"film\.gif: cannot be written \(No space left"):
        run(tmp_path / "film.gif", "point-mass-wall", steps=2)
    assert [p.name for p in tmp_path.iterdir()] == ["film.gif"]
    assert (tmp_path / "film.gif").read_bytes() == b"an older film"


def test_without_graphics_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    for asked, words in (
        ("", "tried egl, osmesa"),
        ("osmesa", "MUJOCO_GL=osmesa"),
        ("nonsense", "MUJOCO_GL=nonsense"),
    ):
        monkeypatch.setenv("MUJOCO_GL", asked)
        monkeypatch.setattr(render, "TRY", {render.platform.system(): ("egl", "osmesa")})
        render.graphics.cache_clear()
        with pytest.raises(ValueError, match=f"{words}.*libegl1, or libosmesa6"):
            render.check(render.Args("hopper", pathlib.Path("film.gif")))
    render.graphics.cache_clear()


def test_as_a_program_it_fails_with_one_line_and_exit_code_2(tmp_path):
    actor, out = write_policy(tmp_path / "ant.npz", 27, 8), str(tmp_path / "film.gif")
    flags = ["--env", "point-mass-wall", "--policy", actor, "--out", out]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, render.__file__, *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: point-mass-wall has 2 observations and 2 actions, but")
    assert line.endswith("takes 27 and gives 8")
