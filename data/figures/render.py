"""Films of episodes, as .mp4, .gif, or a .png strip of single frames.

    python data/figures/render.py --env antmaze-large-diverse --policy policy.npz --out episode.mp4

A policy file, or uniformly random actions, play any environment. Episodes are played on the device, which
returns only positions. The host then draws them.

MuJoCo's renderer draws its models off screen, with EGL or OSMesa. The environment variable MUJOCO_GL chooses
one; without it, the first that works is taken. Matplotlib draws tasks on a plane, which have no model, as
maps. `frames` returns the pictures as an array, for use in a notebook.
"""

import copy
import functools
import importlib
import importlib.util
import math
import os
import pathlib
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

from ooo_rl import envs
from ooo_rl.data import policy
from ooo_rl.envs import maze2d
from ooo_rl.envs.base import Env

# Greatest number of frames per second in real time. For every task, a frame then lasts whole hundredths of a
# second, which .gif requires.
MAX_FPS = 30
UNTIMED = 0.1  # seconds that a film shows a step for, in tasks whose steps have no duration
GAP = 4  # pixels between the frames of a strip
SKY = 238  # grey value of the sky, of 255
# The light comes a little from the front. If it came from straight above, the floor would show slivers of
# its own shadow.
LIGHT = np.array([0.0, 0.45, -0.89])
INK, PATH, WALL, GOAL = "#222222", "#0072B2", "#C3C9D1", "#F0E442"
ON = ("", "1", "on", "true", "enable", "enabled")  # values of MUJOCO_GL that leave the choice open
TRY = {"Linux": ("egl", "osmesa"), "Darwin": ("cgl",), "Windows": ("glfw",)}
PROBE = """
import mujoco, mujoco.{0}
context = mujoco.{0}.GLContext(8, 8)
context.make_current()
mujoco.MjrContext(mujoco.MjModel.from_xml_string("<mujoco/>"), 100).free()
context.free()
"""

Actor = Callable[[jax.Array, jax.Array], jax.Array]  # (observation, key) to action, unbatched
CameraName = Literal["auto", "free", "track"]


class Track(NamedTuple):
    """What is drawn of an episode: the positions of its T states, its goal and its scene."""

    places: np.ndarray  # [T, nq] generalised positions of a model, or [T, 2] positions on a map
    goal: np.ndarray | None  # [2], in tasks with a random goal per episode
    scene: np.ndarray | None = None  # [m], in tasks whose worlds differ in more than their state


def play(env: Env, actor: Actor | None, key: jax.Array, episodes: int = 1, steps: int = 0) -> list[Track]:
    """Plays episodes until they end, or for `steps` steps if that is sooner (0: no bound).

    Without an actor, actions are uniformly random.
    """
    act = actor or (lambda obs, key: envs.random_actions(env, key))

    def place(state):
        inner = state.pipeline_state
        inner = getattr(inner, "body", inner)
        return getattr(inner, "qpos", inner if env_model(env) else state.obs[:2])

    def step(state, key):
        reached = env.step(state, act(state.obs, key))
        return reached, (place(reached), reached.done, reached.info["broken"])

    def episode(key):
        start_key, key = jax.random.split(key)
        state = env.reset(start_key)
        _, (places, done, broken) = jax.lax.scan(
            step, state, jax.random.split(key, min(steps or env.horizon, env.horizon))
        )
        drawn = (getattr(state.pipeline_state, name, None) for name in ("goal", "scene"))
        return place(state), *drawn, places, done, broken

    first, goals, scenes, later, done, broken = jax.tree.map(
        np.asarray,
        jax.jit(jax.vmap(episode), compiler_options=getattr(env, "compiler_options", None))(
            jax.random.split(key, episodes)
        ),
    )
    tracks = []
    for i in range(episodes):
        ends = np.flatnonzero(done[i])
        length = ends[0] + 1 if len(ends) else len(done[i])
        length -= int(broken[i, length - 1])  # the last state of a broken simulation cannot be drawn
        drawn = (None if all_of_them is None else all_of_them[i] for all_of_them in (goals, scenes))
        tracks.append(Track(np.concatenate([first[i][None], later[i, :length]]), *drawn))
    return tracks


def env_model(env: Env) -> mujoco.MjModel | None:
    """The MuJoCo model of an environment; None if it has none."""
    return getattr(env, "model", None)


def draw(
    env: Env, track: Track, which: Iterable[int], width: int, height: int, camera: CameraName = "auto"
) -> Iterator[np.ndarray]:
    """Yields pictures, uint8 [height, width, 3], of the states of an episode with the numbers `which`."""
    if env_model(env) is None:
        return draw_map(env, track, which, width, height)
    return draw_model(env, track, which, width, height, camera)


def frames(
    env: Env,
    actor: Actor | None,
    key: jax.Array,
    width: int = 480,
    height: int = 0,
    camera: CameraName = "auto",
    steps: int = 0,
) -> np.ndarray:
    """Plays one episode and returns a picture of every state, as an array uint8 [T, height, width, 3].

    `height` 0 fits the task's map. The other arguments are as on the command line.
    """
    (track,) = play(env, actor, key, 1, steps)
    return np.stack(
        list(draw(env, track, range(len(track.places)), width, height or fitting_height(env, width), camera))
    )


def fitting_height(env: Env, width: int) -> int:
    """The height that gives a picture the shape of the task's map, or 3/4 of the width; an even number."""
    x0, x1, y0, y1 = getattr(env, "layout", {"bounds": (0, 4, 0, 3)})["bounds"]
    return 2 * round(width * float((y1 - y0) / (x1 - x0)) / 2)


# Maps


def draw_map(env: Env, track: Track, which: Iterable[int], width: int, height: int) -> Iterator[np.ndarray]:
    """`draw` for a task on a plane: walls, the goal, the path so far and the point."""
    layout = env.layout
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    x0, x1, y0, y1 = (float(b) for b in layout["bounds"])
    ax.set(xlim=(x0, x1), ylim=(y0, y1), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set(color="#C8C8C8")
    thin = min(width, height) / 480
    if hasattr(env, "walls"):  # cells, which can be filled
        filled = np.where(env.walls.T[..., None], to_rgb(WALL), 1.0)
        ax.imshow(filled, origin="lower", extent=(x0, x1, y0, y1), interpolation="nearest")
    for wall in layout["walls"]:
        ax.plot(*np.transpose(wall), color=INK, linewidth=3 * thin, solid_capstyle="round", zorder=3)
    shape = {"facecolor": GOAL, "edgecolor": INK, "linewidth": 0.8 * thin, "zorder": 4}
    for goal in layout.get("goals", [layout["goal"]]):
        ax.add_patch(Circle(goal, layout["goal_radius"], **shape))
        ax.plot(*goal, "*", markersize=9 * thin, color=INK, markeredgewidth=0, zorder=5)
    ax.plot(
        *track.places[0],
        "o",
        markersize=8 * thin,
        color="white",
        markeredgecolor=INK,
        markeredgewidth=1.2 * thin,
        zorder=5,
    )
    (way,) = ax.plot([], [], color=PATH, linewidth=2 * thin, alpha=0.7, animated=True)
    (point,) = ax.plot(
        [],
        [],
        "o",
        markersize=9 * thin,
        color="#D55E00",
        markeredgecolor="white",
        markeredgewidth=thin,
        animated=True,
    )
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)
    for i in which:
        canvas.restore_region(background)
        way.set_data(*track.places[: i + 1].T)
        point.set_data(*track.places[i : i + 1].T)
        ax.draw_artist(way)
        ax.draw_artist(point)
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


# Models


@functools.cache
def graphics() -> str:
    """The OpenGL library for MuJoCo to draw with: the one that MUJOCO_GL names, or else the first that works.

    Raises ValueError if none works.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower().strip()
    names = TRY.get(platform.system(), ("glfw",)) if asked in ON else (asked,)
    for name in names:
        # This runs in another process, for two reasons. PyOpenGL cannot change the library once it has loaded
        # one, and a broken driver may crash.
        known = name in ("egl", "osmesa", "glfw", "cgl")
        command = [sys.executable, "-c", PROBE.format(name)]
        if (
            known
            and subprocess.run(command, env={**os.environ, "MUJOCO_GL": name}, capture_output=True).returncode
            == 0
        ):
            return name
    told = "" if asked in ON else f"with MUJOCO_GL={asked} "
    raise ValueError(
        f"MuJoCo cannot draw here {told}(tried {', '.join(names)}): "
        "apt-get install libegl1, or libosmesa6, and unset MUJOCO_GL"
    )


def draw_model(
    env: Env, track: Track, which: Iterable[int], width: int, height: int, camera: CameraName
) -> Iterator[np.ndarray]:
    """`draw` for a MuJoCo model. In mazes, a sphere is the goal and a line is the path so far."""
    model = for_the_eye(env.model, width, height)
    if track.scene is not None:
        for field, row, values in env.engine.scene.split(model, track.scene):
            getattr(model, field)[row] = values
    data = mujoco.MjData(model)
    scene, option, view = (
        mujoco.MjvScene(model, 10_000),
        mujoco.MjvOption(),
        viewpoint(env, track, camera, width / height),
    )
    window, pixels = mujoco.MjrRect(0, 0, width, height), np.empty((height, width, 3), np.uint8)
    # mujoco.Renderer is not used here. It takes the library that was chosen when mujoco was first imported,
    # before this program can choose one.
    opengl = importlib.import_module(f"mujoco.{graphics()}").GLContext(width, height)
    opengl.make_current()
    context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
    try:
        for i in which:
            data.qpos[:] = track.places[i]
            mujoco.mj_forward(model, data)
            if follows(env, camera):
                view.lookat[:2] = data.body("torso").xpos[:2]
            # Shadows are drawn only near the point at which the light is directed.
            data.light_xpos[:] = view.lookat - 4.0 * LIGHT
            data.light_xdir[:] = LIGHT
            mujoco.mjv_updateScene(model, data, option, None, view, mujoco.mjtCatBit.mjCAT_ALL, scene)
            if track.goal is not None:
                add_goal(scene, track.goal, env.radius)
                add_way(scene, track.places[: i + 1, :2])
            opengl.make_current()  # another film may be drawn between two frames of this one
            mujoco.mjr_render(window, scene, context)
            mujoco.mjr_readPixels(pixels, None, window, context)
            yield pixels[::-1].copy()
    finally:
        opengl.make_current()
        context.free()
        opengl.free()


def for_the_eye(model: mujoco.MjModel, width: int, height: int) -> mujoco.MjModel:
    """A copy of `model` with a pale sky, an endless floor of large pale tiles, and softer light.

    It has room for a picture of this width and height.
    """
    model = copy.deepcopy(model)
    model.vis.global_.offwidth, model.vis.global_.offheight = width, height
    floors = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    model.geom_size[floors, :2] = 0
    materials = model.geom_matid[floors & (model.geom_matid >= 0)]
    model.mat_texuniform[materials], model.mat_texrepeat[materials], model.mat_reflectance[materials] = (
        True,
        0.5,
        0.0,
    )
    model.vis.quality.shadowsize = 2048  # half the usual size; drawing is twice as fast
    sizes = model.tex_height * model.tex_width * model.tex_nchannel
    for start, size, kind in zip(model.tex_adr, sizes, model.tex_type):
        texels = model.tex_data[start : start + size]
        texels[:] = SKY if kind == mujoco.mjtTexture.mjTEXTURE_SKYBOX else 170 + texels // 4
    model.vis.rgba.haze[:3] = SKY / 255
    model.vis.headlight.specular[:], model.light_specular[:] = 0.0, 0.1
    model.vis.headlight.ambient[:], model.vis.headlight.diffuse[:], model.light_diffuse[:] = 0.25, 0.4, 0.5
    return model


def follows(env: Env, camera: CameraName) -> bool:
    """Whether the camera follows the torso."""
    torso = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_BODY, "torso") >= 0
    return torso and (camera == "track" or (camera == "auto" and not hasattr(env, "layout")))


def viewpoint(env: Env, track: Track, camera: CameraName, aspect: float) -> mujoco.MjvCamera:
    """The camera. It stands at the viewpoint of the task, if the task has one.

    Otherwise it stands near the torso if it follows the torso. If not, it has the whole maze in view, or the
    whole path of the episode if there is no maze.
    """
    view = mujoco.MjvCamera()
    if hasattr(env, "view"):
        view.lookat, (view.distance, view.azimuth, view.elevation) = env.view[:3], env.view[3:]
        return view
    planar = env.model.jnt_type[0] != mujoco.mjtJoint.mjJNT_FREE
    view.azimuth, view.elevation = 90, -12 if planar else -30
    view.lookat[2] = 0.6
    view.distance = 4.0
    if not follows(env, camera):
        xs, ys = track.places[:, 0], 0 * track.places[:, 0] if planar else track.places[:, 1]
        x0, x1, y0, y1 = (
            env.layout["bounds"] if hasattr(env, "layout") else (xs.min(), xs.max(), ys.min(), ys.max())
        )
        if hasattr(env, "layout"):
            view.elevation, view.lookat[2] = -80, 0.0
        view.lookat[:2] = (x0 + x1) / 2, (y0 + y1) / 2
        tangent = math.tan(math.radians(env.model.vis.global_.fovy) / 2)
        view.distance = 3.0 + 1.08 * max(y1 - y0, (x1 - x0) / aspect) / 2 / tangent
    elif hasattr(env, "layout"):
        view.elevation, view.distance = -70, 12.0
    return view


def add_goal(scene: mujoco.MjvScene, goal: np.ndarray, radius: float) -> None:
    """Adds a translucent sphere at the goal [2] to the scene."""
    sphere = scene.geoms[scene.ngeom]
    mujoco.mjv_initGeom(
        sphere,
        mujoco.mjtGeom.mjGEOM_SPHERE,
        [radius] * 3,
        [*goal, radius],
        np.eye(3).ravel(),
        np.float32([0.1, 0.8, 0.3, 0.5]),
    )
    sphere.transparent = 1
    scene.ngeom += 1


def add_way(scene: mujoco.MjvScene, way: np.ndarray, spacing: float = 0.3) -> None:
    """Adds a line along the positions `way` [T, 2] to the scene.

    A position that is nearer than `spacing` to the last one on the line is skipped.
    """
    last = way[0]
    for place in way[1:]:
        if np.linalg.norm(place - last) >= spacing and scene.ngeom < scene.maxgeom:
            line = scene.geoms[scene.ngeom]
            mujoco.mjv_initGeom(
                line,
                mujoco.mjtGeom.mjGEOM_CAPSULE,
                np.zeros(3),
                np.zeros(3),
                np.eye(3).ravel(),
                np.float32([0.9, 0.2, 0.1, 1]),
            )
            mujoco.mjv_connector(line, mujoco.mjtGeom.mjGEOM_CAPSULE, 0.12, [*last, 0.1], [*place, 0.1])
            scene.ngeom, last = scene.ngeom + 1, place


# Files


def write_film(path: pathlib.Path, pictures: Iterator[np.ndarray], fps: float) -> None:
    """Writes pictures to an .mp4 or .gif file, one by one as they are drawn."""
    if path.suffix == ".gif":
        images = map(Image.fromarray, pictures)
        next(images).save(path, save_all=True, append_images=images, duration=1000 / fps, loop=0)
        return
    import imageio.v2 as imageio

    with warnings.catch_warnings():
        # JAX warns about a fork. It is harmless here, since the child process becomes ffmpeg at once.
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        with imageio.get_writer(
            path, format="FFMPEG", fps=fps, codec="libx264", quality=7, macro_block_size=2
        ) as writer:
            for picture in pictures:
                writer.append_data(picture)


def write_strip(path: pathlib.Path, rows: list[list[np.ndarray]]) -> None:
    """Writes pictures side by side to a .png file, with one row per episode."""
    height, width, _ = rows[0][0].shape
    size = (len(rows) * (height + GAP) - GAP, max(map(len, rows)) * (width + GAP) - GAP, 3)
    sheet = np.full(size, 255, np.uint8)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet[r * (height + GAP) :, c * (width + GAP) :][:height, :width] = picture
    Image.fromarray(sheet).save(path)


@dataclass(frozen=True)
class Args:
    """Plays episodes of an environment and draws them: a film (.mp4, .gif) or a strip of frames (.png)."""

    env: str
    """environment"""
    out: pathlib.Path
    """file to write: .mp4, .gif, or .png for a strip of frames with one row per episode"""
    policy: str = ""
    """the policy's .npz file; without it, actions are uniformly random"""
    episodes: int = 1
    """episodes, one after the other"""
    seed: int = 0
    """random seed of everything"""
    steps: int = 0
    """greatest number of steps of an episode to show; 0: all"""
    sample: bool = False
    """sample the policy's actions instead of taking their mean"""
    physics: Literal["auto", "mjx", "mjx-warp", "mujoco"] = "auto"
    """physics engine"""
    width: int = 480
    """width of a frame in pixels"""
    height: int = 0
    """height of a frame in pixels; 0: the shape of the task's map, or 3/4 of the width"""
    fps: float = 0.0
    """frames per second of a film of every step; 0: real time, with at most 30 of the steps per second"""
    frames: int = 5
    """frames of an episode in a strip"""
    camera: CameraName = "auto"
    """track follows the body, free stands still and sees the path or maze; auto: free in mazes, else track"""


def check(args: Args) -> Env:
    """Makes the environment of `args`. Raises ValueError for the first flag that makes drawing impossible."""
    for name, least in (("episodes", 1), ("seed", 0), ("steps", 0), ("frames", 1), ("fps", 0)):
        if not least <= getattr(args, name) < math.inf:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(args, name)}")
    for name in ("width", "height"):
        size = getattr(args, name)
        if size % 2 or (not 16 <= size <= 4096 and (name, size) != ("height", 0)):
            raise ValueError(f"--{name} must be an even number of pixels from 16 to 4096, not {size}")
    if args.out.suffix not in (".mp4", ".gif", ".png"):
        raise ValueError(f"--out {args.out}: its name must end in .mp4, .gif or .png")
    if args.out.suffix == ".mp4" and not all(map(importlib.util.find_spec, ("imageio", "imageio_ffmpeg"))):
        raise ValueError(
            "an .mp4 needs ffmpeg: pip install 'imageio[ffmpeg]' (or pip install -e '.[video]'), "
            "or write a .gif"
        )
    if args.out.is_dir() or not args.out.parent.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise ValueError(f"--out {args.out}: must be a file in a folder that exists and can be written to")
    env = envs.make(args.env, args.physics)
    if env_model(env) is not None:
        graphics()
    elif not hasattr(env, "layout"):
        raise ValueError(f"--env {args.env}: nothing moves there, so there is nothing to draw")
    return env


def load_actor(path: str, env: Env, name: str, sample: bool) -> Actor | None:
    """Loads the policy in the file `path`; None if `path` is empty.

    Raises ValueError if the policy does not fit the environment, which is called `name`.
    """
    if not path:
        return None
    loaded = policy.load(path)
    takes, gives = policy.policy_sizes(loaded)
    if (takes, gives) != (env.observation_size, env.action_size):
        has = f"{name} has {env.observation_size} observations and {env.action_size} actions"
        raise ValueError(f"{has}, but {path} takes {takes} and gives {gives}")
    if policy.is_discrete(loaded) != envs.is_discrete(env):
        raise ValueError(f"of {name} and {path}, one has discrete actions and the other has not")
    # This raises ValueError for a policy that cannot be sampled.
    policy.act(loaded, np.zeros(takes), np.random.default_rng(0) if sample else None)
    noise = lambda key: jax.random.normal(key, (gives,)) if sample else None  # noqa: E731
    return lambda obs, key: policy.forward(loaded, obs, noise(key), jnp)


def main(args: Args) -> None:
    """The command-line program. Raises ValueError for a mistake that the user can correct."""
    env = check(args)
    actor = load_actor(args.policy, env, args.env, args.sample)
    temporary = args.out.with_name(f".{args.out.stem}.tmp{args.out.suffix}")
    try:
        temporary.touch()
        tracks = play(env, actor, jax.random.PRNGKey(args.seed), args.episodes, args.steps)
        shown, fps = choose(env, args, tracks)
        height = args.height or fitting_height(env, args.width)
        films = (
            draw(env, track, which, args.width, height, args.camera) for track, which in zip(tracks, shown)
        )
        if args.out.suffix == ".png":
            write_strip(temporary, [list(film) for film in films])
        else:
            write_film(temporary, (picture for film in films for picture in film), fps)
        os.replace(temporary, args.out)
    except OSError as error:
        raise ValueError(f"--out {args.out}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    lengths = ", ".join(str(len(track.places) - 1) for track in tracks)
    print(
        f"wrote {args.out}: {args.env}, {lengths} steps, "
        f"{sum(map(len, shown))} frames of {args.width} x {height}"
    )


def choose(env: Env, args: Args, tracks: list[Track]) -> tuple[list[Any], float]:
    """The numbers of the states to draw of each episode, and the frames per second."""
    if args.out.suffix == ".png":
        return [
            np.unique(np.linspace(0, len(track.places) - 1, args.frames).round().astype(int))
            for track in tracks
        ], 1.0
    seconds = maze2d.TIMESTEP if isinstance(env, maze2d.Maze2D) else getattr(env, "dt", UNTIMED)
    rate = 1 / seconds
    stride = 1 if args.fps else math.ceil(rate / MAX_FPS - 1e-6)
    return [range(0, len(track.places), stride) for track in tracks], args.fps or rate / stride


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
