"""Lighter meshes for Panda's arm: in software, most of a camera frame's time is its 400,000 vertices."""

from __future__ import annotations

import gymnasium as gym
import numpy as np

KEEP = 0.1  # share of the triangles that stays
LINKS = [f"panda_link{i}" for i in range(7)]  # hand, fingers and the flange above them stay as they are


def lighten(env: gym.Env) -> gym.Env:
    """Swap the arm's meshes for lighter ones whenever ManiSkill builds the scene (this once, too, at the next reset)."""
    base = env.unwrapped
    after = base._after_reconfigure

    def swap(options: dict) -> None:
        after(options)
        for link in base.agent.robot.links:
            if link.name in LINKS:
                for body in link._objs:
                    replace(body.entity)

    base._after_reconfigure = swap
    return env


def replace(entity) -> None:
    """The same shapes, materials and poses in the place of an entity's render component, with fewer triangles."""
    from sapien.render import RenderBodyComponent, RenderShapeTriangleMesh

    old = entity.find_component_by_type(RenderBodyComponent)
    new = RenderBodyComponent()
    for shape in old.render_shapes:
        for part, (vertices, triangles, normals) in zip(shape.parts, light_parts(shape.filename, shape)):
            uvs = np.zeros((len(vertices), 2), np.float32)
            light = RenderShapeTriangleMesh(vertices, triangles, normals, uvs, part.material)
            light.local_pose = shape.local_pose
            new.attach(light)
    entity.remove_component(old)
    entity.add_component(new)


PARTS: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}  # by file: made once a process


def light_parts(file: str, shape) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Vertices [V, 3], triangles [T, 3] and normals [V, 3] of each part of a mesh."""
    if file not in PARTS:
        PARTS[file] = [decimate(np.asarray(part.vertices), np.asarray(part.triangles)) for part in shape.parts]
    return PARTS[file]


def decimate(vertices: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A mesh with KEEP of its triangles and smooth normals. Shapes: [V, 3], [T, 3] -> the same, and normals [V, 3]."""
    import fast_simplification

    vertices, inverse = np.unique(vertices.round(6), axis=0, return_inverse=True)  # files repeat them per triangle
    triangles = inverse.reshape(-1)[triangles].astype(np.int32)
    vertices, triangles = fast_simplification.simplify(vertices.astype(np.float32), triangles, 1 - KEEP)
    corners = vertices[triangles]  # [T, 3, 3]
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])  # longer for larger triangles
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, triangles[:, corner], across)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-12)
    return vertices, triangles.astype(np.uint32), normals
