# The environment of this repository, for state and camera mode; the code comes from your checkout. See docs/cluster.md.
#   docker build -t vla-rl .
#   docker run --rm -u "$(id -u):$(id -g)" -v "$PWD:/work" vla-rl python bc.py --env-id PushCube-v1 --obs-mode state
FROM debian:bookworm-slim

# setup.sh installs Debian's packages (Mesa 25 from backports, for rendering), then .venv, and renders a frame.
WORKDIR /opt/vla-rl
COPY setup.sh requirements.txt ./
RUN bash setup.sh \
    && rm -rf /var/lib/apt/lists/* /root/.cache /root/.maniskill \
    && chmod -R a+rX /opt/vla-rl

# Any user may run it: what libraries write goes to /tmp, what runs write to the folder mounted at /work.
ENV PATH=/opt/vla-rl/.venv/bin:$PATH \
    HOME=/tmp \
    USER=vla-rl \
    NVIDIA_DRIVER_CAPABILITIES=all
WORKDIR /work
USER 65534:65534
CMD ["python", "bc.py", "--help"]
