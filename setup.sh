#!/usr/bin/env bash
# Prepares this machine: system packages, the virtual environment .venv, and a check that a camera frame renders.
#
#   bash setup.sh            everything; run as root it installs missing system packages, else it says which
#   bash setup.sh --system   system packages only (as root), for when .venv shall belong to another user
#
# What is in place is left alone, so running it again takes seconds. PYTHON=/path/to/python3.11 picks the interpreter.
# The last line is "ready: ..." or "not ready: <what is missing> - <the fix>" (exit code 1).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { said=1; echo "not ready: $1 - $2"; exit 1; }
trap 'code=$?; [ $code = 0 ] || [ -n "${said:-}" ] || echo "not ready: setup.sh broke off - see the error above"' EXIT
[[ ${1:-} =~ ^(--system)?$ ]] || fail "unknown option $1" "bash setup.sh [--system]"
[ "$(uname -sm)" = "Linux x86_64" ] || fail "this is $(uname -sm)" "SAPIEN's wheels need Linux on x86_64"

# --- probes: what this machine has -----------------------------------------------------------------------------------

find_python() {  # sets $python to the environment's interpreter, or else to one that can make the environment
  for python in .venv/bin/python ${PYTHON:-python3.11 python3.12 python3}; do
    "$python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && return
  done
  return 1
}

missing_packages() {  # prints the Debian packages that hold what this machine lacks
  command -v git >/dev/null || echo git  # ManiSkill cannot record demonstrations without it
  [ -e /etc/ssl/certs/ca-certificates.crt ] || [ -d /etc/pki ] || echo ca-certificates
  "$python" - <<'EOF'
import ctypes, shutil
libraries = {"libX11.so.6": "libx11-6", "libgthread-2.0.so.0": "libglib2.0-0",  # SAPIEN and OpenCV link these
             "libGL.so.1": "libgl1", "libvulkan.so.1": "libvulkan1"}
if shutil.which("nvidia-smi"):  # NVIDIA's Vulkan driver links these
    libraries |= {"libXext.so.6": "libxext6", "libEGL.so.1": "libegl1"}
for library, package in libraries.items():
    try:
        ctypes.CDLL(library)
    except OSError:
        print(package)
EOF
  vulkan_works || echo mesa-vulkan-drivers
}

vulkan_works() {  # has a Vulkan device what SAPIEN needs? Mesa 25's lavapipe has, Debian 12's Mesa 22.3 has not
  "$python" - 2>/dev/null <<'EOF'
import ctypes, sys
try:
    sys.exit(not ctypes.CDLL("libGLX_nvidia.so.0"))  # NVIDIA's driver has it; SAPIEN finds it unaided
except OSError:
    vk = ctypes.CDLL("libvulkan.so.1")
instance, count = ctypes.c_void_p(), ctypes.c_uint32()
create_info = (ctypes.c_uint64 * 8)(1)  # VkInstanceCreateInfo: its type is 1, everything else is zero
if vk.vkCreateInstance(create_info, None, ctypes.byref(instance)):
    sys.exit(1)
vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
devices = (ctypes.c_void_p * count.value)()
vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
for device in map(ctypes.c_void_p, devices):
    vk.vkEnumerateDeviceExtensionProperties(device, None, ctypes.byref(count), None)
    extensions = ctypes.create_string_buffer(260 * count.value)  # VkExtensionProperties: 256 characters, one integer
    vk.vkEnumerateDeviceExtensionProperties(device, None, ctypes.byref(count), extensions)
    if b"VK_EXT_descriptor_indexing\0" in extensions.raw:
        sys.exit(0)
sys.exit(1)
EOF
}

# --- system packages -------------------------------------------------------------------------------------------------

apt() { DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@"; }

start_apt() {  # MISSING: refreshes the package lists, where that is possible
  command -v apt-get >/dev/null || fail "missing: $1" "install it with this system's package manager (Debian's names)"
  [ "$(id -u)" = 0 ] || fail "missing: $1" "run as root: bash '$PWD/setup.sh' --system"
  apt update || echo "apt-get update reported a problem; going on with the lists at hand"
}

add_backports() {  # Debian 12: the backports suite, at the address that serves this machine Debian itself
  local policy='^ *release .*n=bookworm-backports' list=/etc/apt/sources.list.d/bookworm-backports.list site entry key
  apt-cache policy | grep -q "$policy" && return
  read -r site entry < <(apt-get indextargets --format '$(SITE) $(SOURCESENTRY)' \
    'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 'Codename: bookworm' 'Component: main') ||
    fail "no apt source serves Debian 12" "add Debian 12's main archive to /etc/apt/sources.list"
  key=$(sed -nE 's/^Signed-By: *(\S+)/signed-by=\1/ip; s/^deb .*(signed-by=[^] ]+).*/\1/p' "${entry%:*}" | head -n 1)
  echo "deb ${key:+[$key] }$site bookworm-backports main" >"$list"
  apt update && apt-cache policy | grep -q "$policy" && return
  rm "$list"
  fail "$site has no bookworm-backports" "install mesa-vulkan-drivers 25 from another source"
}

if ! find_python; then
  start_apt "Python 3.11 or 3.12 with venv (python3-venv)"
  for package in python3.11-venv python3.12-venv; do
    if apt-cache show $package &>/dev/null; then apt install -y --no-install-recommends $package && break; fi
  done
  find_python || fail "missing: Python 3.11 or 3.12 with venv" "install one; PYTHON=/path/to/python3.11 bash setup.sh"
fi

missing=$(missing_packages | xargs)
if [ -n "$missing" ]; then
  start_apt "$missing"
  suite=()
  if [[ $missing == *mesa* ]] && grep -qs '^VERSION_CODENAME=bookworm' /etc/os-release; then
    add_backports
    suite=(-t bookworm-backports)
  fi
  apt install -y --no-install-recommends "${suite[@]}" $missing || fail "missing: $missing" "see apt-get's error above"
  missing=$(missing_packages | xargs)
  [ "$missing" != mesa-vulkan-drivers ] ||
    fail "missing: a Vulkan driver with descriptor indexing (Mesa 25 is known to work)" "upgrade mesa-vulkan-drivers"
  [ -z "$missing" ] || fail "still missing: $missing" "see apt-get's output above"
fi
[ -z "${1:-}" ] || { echo "ready: system packages"; exit; }

# --- Python packages -------------------------------------------------------------------------------------------------

stamp=.venv/requirements.sha256  # written after a complete installation
hash=$(sha256sum <requirements.txt)
if [ "$python" != .venv/bin/python ] || [ "$hash" != "$(cat $stamp 2>/dev/null)" ]; then
  mkdir -p .venv && [ -w .venv ] || fail "cannot write $PWD/.venv" "run bash setup.sh as its owner, or remove it"
  [ "$python" = .venv/bin/python ] || "$python" -m venv --clear .venv || fail "cannot make .venv" "see the error above"
  .venv/bin/python -m pip --version &>/dev/null || .venv/bin/python -m ensurepip  # an earlier run was interrupted
  .venv/bin/python -m pip install -r requirements.txt || fail "the packages of requirements.txt" "see pip's error above"
  echo "$hash" >$stamp
fi

# --- check -----------------------------------------------------------------------------------------------------------

log=$(mktemp)
.venv/bin/python - >"$log" 2>&1 <<'EOF' || true
import platform, shutil
import cv2, gymnasium, mani_skill.envs, mplib, sapien, torch
backend = "gpu" if shutil.which("nvidia-smi") else "cpu"  # ManiSkill itself goes back to the CPU where CUDA is absent
env = gymnasium.make("StackCube-v1", obs_mode="rgb", sim_backend="physx_cpu", render_backend=backend,
                     sensor_configs={"width": 32, "height": 32})
env.reset(seed=0)
frame = env.step(env.action_space.sample())[0]["sensor_data"]["base_camera"]["rgb"]
assert frame.float().std() > 1, "the rendered frame is blank"
device = sapien.render.get_device_summary().split("\n")[0].removeprefix("GPU: ")
print(f"\nready: Python {platform.python_version()}, torch {torch.__version__}, "
      f"mani_skill {mani_skill.__version__}, Vulkan on {device}")
EOF
if ! grep '^ready: ' "$log"; then
  tail -n 20 "$log"
  fix="see the error above, all of it in $log"
  [ -z "$(command -v nvidia-smi)" ] || fix+="; in a container, NVIDIA_DRIVER_CAPABILITIES=all shows it the Vulkan driver"
  fail "a camera frame could not be rendered: $(tail -n 1 "$log")" "$fix"
fi
rm "$log"
