"""An operator without a person: ManiSkill's motion planner solves the task from where the policy has got to."""

from __future__ import annotations

import contextlib
import io

import gymnasium as gym
import numpy as np
import torch

from plumbing.flags import UserError

PATIENCE = 15  # control steps without progress, after which the planner takes over
PROGRESS = 0.02  # metres; less than this isn't progress


def check_planner(env_id: str) -> None:
    """Raises: UserError if ManiSkill has no plan for the task."""
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

    if env_id not in MP_SOLUTIONS:
        raise UserError(f"--intervention oracle: ManiSkill has no motion planner for {env_id}")


def bare_env(args, control_mode: str) -> gym.Env:
    """The task without observations, for plans and recordings."""
    return gym.make(
        args.env_id,
        obs_mode="none",
        control_mode=control_mode,
        robot_uids=args.robot_uids,
        reward_mode="sparse",
        sim_backend="physx_cpu",
        render_backend="cpu",
        sim_config=dict(control_freq=args.control_freq),
        reconfiguration_freq=1,
        max_episode_steps=1_000_000,
    )


class Solved(Exception):
    """The planner has reached the goal."""


class Oracle(gym.Wrapper):
    """Takes over where a person would, and acts to the end of the episode.

    That is, without a look at the reward, when nothing moves (`stalled`), or when the episode takes longer than the
    demonstrations. The plan is made in a simulator of its own (this wrapper's), whose state becomes that of the training
    environment each time the solution asks for a reset. It is joint targets; the hand poses that they aim at are then
    followed in closed loop through the training environment's controller.
    """

    def __init__(self, env, args, clip, slowest: int):
        """env: the training environment, of one. clip: into the policy's box. slowest: steps of a demonstration."""
        from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

        super().__init__(bare_env(args, "pd_joint_pos"))
        self.real = env
        self.clip = clip
        self.solve = MP_SOLUTIONS[args.env_id]
        self.latest = slowest if args.takeover_after is None else args.takeover_after

    def start(self, seed: int) -> None:
        self.seed = seed
        self.past = []  # where hand and objects were
        self.acts = False
        self.path = None  # hand poses and gripper commands
        self.at = 0  # the one that is aimed at
        self.failed = 0

    def __call__(self, t: int, action: np.ndarray) -> np.ndarray | None:
        """The operator's action at step t, or None to let the policy act."""
        real = self.real.envs[0].unwrapped
        state = real.get_state_dict()
        places = [real.agent.tcp.pose.p[0]]
        places += [actor[0, :3] for actor in state["actors"].values()]
        self.past.append(torch.stack(places).numpy())
        if not self.acts:
            nothing_moves = stalled(np.stack(self.past), PATIENCE, PROGRESS)
            self.acts = nothing_moves or t >= self.latest
        if self.failed or not self.acts:
            return None
        if self.path is None or self.at > len(self.path) + 10:  # done, and the task isn't: plan again
            self.path = self.plan(state)
            self.at = 0
        if self.path is None:
            self.failed = 1
            return None
        next_or_last = min(self.at, len(self.path) - 1)
        target, gripper = self.path[next_or_last]
        wanted = self.towards(real.agent.controller.controllers["arm"], target, gripper)
        action = self.clip(wanted)
        self.at += np.abs(action - wanted).max() < 0.01  # waits for a hand that is behind
        return action

    @staticmethod
    def towards(arm, target, gripper: float) -> np.ndarray:
        """The controller's action [A] from the present hand pose to `target`."""
        import sapien
        from mani_skill.trajectory.utils.actions.conversion import delta_pose_to_pd_ee_delta

        hand = arm.ee_link.pose.sp
        turn = hand * target.inv()  # ManiSkill's convention for delta rotations
        delta = sapien.Pose(target.p - hand.p, turn.q)
        moves = delta_pose_to_pd_ee_delta(arm, delta, arm.config.frame == "root_translation")
        return np.append(moves, gripper).astype(np.float32)

    # --- plans ---
    def plan(self, state: dict) -> list | None:
        """Hand poses and gripper commands that solve the task from `state`, or None.

        ManiSkill's solutions begin by opening the hand, whatever it holds. What it holds now it keeps until the solution
        has closed it, and then goes straight to where a stretch of one gripper command ends, the last one that will do.
        """
        self.state = state
        agent = self.real.envs[0].unwrapped.agent
        actors = agent.scene.actors.values()
        holds = any(bool(agent.is_grasping(actor)) for actor in actors)
        if holds and self.solved(held=True):
            return self.shortest(self.aims, np.stack(self.moves))
        if self.solved(held=False):
            return self.aims
        return None

    def solved(self, held: bool) -> bool:
        """Whether ManiSkill's solution does it; `aims` and `moves` then hold its plan."""
        self.held = held
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the planner reports each path it doesn't find
                self.solve(self, seed=self.seed, debug=False, vis=False)
                self.settle()
        except Solved:
            return True
        except Exception:  # the solutions raise all sorts where no plan exists
            pass
        return False

    def shortest(self, plan: list, moves: np.ndarray) -> list:
        """`plan`, or without its beginning; moves [T, A] are its joint targets and gripper commands."""
        joints_only = moves[:, :-1]
        speed = np.abs(np.diff(joints_only, axis=0)).max(initial=0.02)  # rad per step, the plan's own
        changes = np.flatnonzero(np.diff(moves[:, -1]))
        for end in [len(moves) - 1, *changes[::-1]]:
            self.reset(seed=self.seed)
            target = joints_only[end]
            joints = self.unwrapped.agent.robot.get_qpos()[0].numpy()[: len(target)]
            distance = np.abs(target - joints).max()
            n = int(distance / speed) + 1
            line = np.linspace(joints, target, n + 1)[1:]
            gripper = np.full(n, moves[end, -1])
            straight = np.column_stack([line, gripper])
            try:
                for move in [*straight, *moves[end + 1 :]]:
                    self.step(move)
                self.settle()
            except Solved:
                return self.aims
        return plan

    def settle(self) -> None:
        """Things may have to come to rest."""
        for _ in range(10):
            self.step(self.moves[-1])

    # --- the simulator of its own, as ManiSkill's solutions see it ---
    def reset(self, *, seed=None, options=None):
        result = self.env.reset(seed=seed)
        base = self.unwrapped
        base.set_state_dict(self.state)
        base.agent.controller.reset()
        self.model = base.agent.robot.create_pinocchio_model()
        self.aims = []
        self.moves = []
        self.keep = self.held
        return result

    def step(self, action):
        """Raises: Solved when the goal is reached."""
        self.keep &= action[-1] > 0  # until the solution closes the hand itself
        if self.keep:
            action = np.append(action[:-1], -1)
        agent = self.unwrapped.agent
        result = self.env.step(action)
        joints = agent.robot.get_qpos()[0].numpy().copy()
        joints[: len(action) - 1] = action[:-1]
        self.model.compute_forward_kinematics(joints)
        hand = agent.robot.pose.sp * self.model.get_link_pose(agent.tcp.index)
        self.moves.append(action)
        self.aims.append((hand, action[-1]))
        if result[4]["success"].item():
            raise Solved
        return result


def stalled(past: np.ndarray, patience: int, distance: float) -> bool:
    """Whether no place in past [T, places, 3] is farther than `distance` from where it was `patience` steps ago."""
    if len(past) <= patience:
        return False
    before = past[-1 - patience]
    moved = np.linalg.norm(past[-1] - before, axis=-1)
    return moved.max() < distance
