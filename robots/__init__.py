"""Real robots in the place of the simulator: `--robot franka-http --robot-config FILE.toml`. How to: docs/franka.md.

franka_http is what a script's make_env returns then. It is put together of a file's settings (config), what a command
may be (limits), the robot's server and the emergency stop (server), cameras, and what says success (keys, classifier).
check, release, record and classifier are programs: `python -m robots.check franka.toml`.
"""
