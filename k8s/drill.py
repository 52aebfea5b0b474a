"""The pods of a RayService as namespaces of a Linux machine: what NetworkPolicies let through is enough, and no more.

    sudo python k8s/drill.py [OVERLAY]        (default cpu-dev; needs nftables, iproute2, util-linux, 4 GB of memory)

Each pod has a network, mount and process namespace of its own, an address, /tmp, /dev/shm, HOME and config file, a
read-only root, the manifests' uid and no capabilities. nftables does what Kubernetes would make of the NetworkPolicies.
KubeRay's part is played here: a token, `ray start` with the group's rayStartParams and resources, serveConfigV2 sent to
the dashboard. Then probes are asked, a request is sent, listening ports are listed and tried by a stranger, and a
gateway's pod leaves under a stream. Nothing of Kubernetes itself is proved.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from serve.kubernetes.kustomize import build  # noqa: E402
from serve.kubernetes.overlay import CONFIG_MOUNT, Overlay, Pod, quantity  # noqa: E402
from serve.kubernetes.rules.network import passing, told  # noqa: E402
from serve.kubernetes.rules.ray import listening  # noqa: E402

NET = "10.88.0"
KUBELET = f"{NET}.1"
STRANGER = "td-stranger"
KEY = "sk-drill"


class Namespace:
    """A pod that runs here: its template, its name, its address and, once started, its process."""

    def __init__(self, pod: Pod | None, name: str, number: int) -> None:
        self.pod, self.name, self.address = pod, name, f"{NET}.{number}"
        self.process: subprocess.Popen[bytes] | None = None

    def create(self) -> None:
        link = f"v{os.getpid()}-{self.address.rpartition('.')[2]}"
        _run(f"ip netns add {self.name}")
        _run(f"ip link add {link} type veth peer name eth0 netns {self.name}")
        _run(f"ip link set {link} master td-bridge up")
        for command in (f"addr add {self.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _run(f"ip -n {self.name} {command}")
        _run(f"ip -n {self.name} route add default via {KUBELET}")

    def guard(self, pods: list[Namespace], overlay: Overlay) -> None:
        """The input filter that the policies amount to. The kubelet's node always reaches a pod."""
        assert self.pod is not None and overlay.options is not None
        rules = ["ct state established,related accept", 'iif "lo" accept', f"ip saddr {KUBELET} accept"]
        for other in pods:
            assert other.pod is not None
            if ports := told(passing(overlay, other.pod, self.pod)):
                rules.append(f"ip saddr {other.address} tcp dport {{ {ports} }} accept")
        if self.pod in overlay.gateways:  # any pod of the namespace may call the API
            rules.append(f"tcp dport {overlay.options.gateway.port} accept")
        chain = "\n".join(["type filter hook input priority 0; policy drop;", *rules])
        _run(f"ip netns exec {self.name} nft -f -", text=f"table inet pods {{\nchain input {{\n{chain}\n}}\n}}")

    def start(self, folder: Path, token: str, head: str | None) -> None:
        assert self.pod is not None
        user = self.pod.spec["securityContext"]["runAsUser"]
        shm = next(v["emptyDir"]["sizeLimit"] for v in self.pod.spec["volumes"] if v["name"] == "shm")
        mounts = [
            "mount --make-rprivate /",
            "mount -t proc proc /proc",
            *_readable(Path(sys.base_prefix)),
            "mount -t tmpfs -o mode=755 tmpfs /etc/tandem",
            f"mkdir {CONFIG_MOUNT} && mount --bind {folder} {CONFIG_MOUNT}",
            "mount -t tmpfs -o mode=1777 tmpfs /home/tandem",
            f"mkdir -m 1777 {folder.parent}/{self.name} && mount --bind {folder.parent}/{self.name} /tmp",
            f"mount -t tmpfs -o mode=1777,size={int(quantity(shm) or 0)} shm /dev/shm",
            f"mkdir /etc/tandem/keys && echo {KEY} > /etc/tandem/keys/api-keys",
            "mount -o remount,ro,bind /",
        ]
        environment = {v["name"]: v["value"] for v in self.pod.spec["containers"][0]["env"] if "value" in v}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PYTHONPATH": str(ROOT)}
        environment |= {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
        environment |= {
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_health_check_failure_threshold": "60",
        }  # a busy machine
        assigned = shlex.join(f"{name}={value}" for name, value in environment.items())
        drop = f"setpriv --reuid {user} --regid {user} --clear-groups --no-new-privs --bounding-set -all"
        command = f"exec {drop} env -i {assigned} {shlex.join(_ray_start(self.pod, head))}"
        script = " && ".join([*mounts, "cd /home/tandem", command])
        enter = ["ip", "netns", "exec", self.name, "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        log = (folder.parent / f"{self.name}.log").open("wb")
        self.process = subprocess.Popen([*enter, "sh", "-c", script], stdout=log, stderr=log)
        self.environment, self.drop = assigned, drop

    def inside(self, *command: str) -> subprocess.Popen[bytes]:
        """Run a command in the pod, as a lifecycle hook does."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        enter = ["nsenter", "--target", children[0], "--mount", "--pid", "--net", "--wd=/home/tandem"]
        return subprocess.Popen(
            [*enter, "sh", "-c", f"exec {self.drop} env -i {self.environment} {shlex.join(command)}"]
        )

    def listening(self) -> dict[int, str]:
        """Port to `address process` of every TCP socket that listens beyond loopback."""
        found = {}
        for line in _run(f"ip netns exec {self.name} ss -Hltnp").splitlines():
            fields = line.split()
            host, _, port = fields[3].rpartition(":")
            if not host.startswith(("127.", "[::1]")):
                found[int(port)] = f"{host:>10}  {fields[-1].split(chr(34))[1] if chr(34) in fields[-1] else ''}"
        return found


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "cpu-dev"
    overlay = Overlay(name, build(ROOT / "k8s" / "overlays" / name))
    folder, token = Path(tempfile.mkdtemp(prefix="td-")), secrets.token_hex(32)
    (folder / "config").mkdir()
    (folder / "config" / "config.yaml").write_text(overlay.config_text or "")
    for path in (folder, folder / "config"):
        path.chmod(0o755)
    ray = [pod for pod in overlay.pods if pod.is_ray for _ in range(pod.least)]
    pods = [Namespace(pod, f"td-{pod.role}-{number}", 10 + number) for number, pod in enumerate(ray)]
    with _network(pods):
        for pod in pods:
            pod.guard(pods, overlay)
        head = pods[0]
        head.start(folder / "config", token, None)
        _eventually(lambda: _get(head, 8265, "/api/gcs_healthz") == 200, "the head's readiness")
        for pod in pods[1:]:
            pod.start(folder / "config", token, head.address)
        service = next(overlay.of("RayService"))
        _deploy(head, token, yaml.safe_load(service["spec"]["serveConfigV2"]))
        gateways = [pod for pod in pods if pod.pod and pod.pod.role == "gateway"]
        for gateway in gateways:
            _eventually(lambda pod=gateway: _probe(pod, "readinessProbe") == 200, f"{gateway.name}'s readiness")
        _show_probes(pods)
        print("answer:", _ask(gateways[0]))
        _show_ports(pods, overlay)
        _show_leave(gateways)
    shutil.rmtree(folder)


def _readable(python: Path) -> list[str]:
    """Mounts that let others than root reach an interpreter that lies in root's home."""
    if Path("/root") not in python.parents:
        return []
    show = ["mount --bind {0} /mnt", "mount -t tmpfs -o mode=755 tmpfs /root", "mkdir -p {0}", "mount --bind /mnt {0}"]
    return [command.format(python) for command in show]


def _ray_start(pod: Pod, head: str | None) -> list[str]:
    """KubeRay's command: rayStartParams, the group's resources, and where the head is."""
    params = {**pod.ray_params, "block": "true"}
    resources = {key: float(value) for key, value in pod.group.get("resources", {}).items()}
    limits = pod.spec["containers"][0]["resources"]["limits"]
    params["num-cpus"] = str(int(resources.pop("CPU", quantity(limits["cpu"]) or 1)))
    params["memory"] = str(int(quantity(limits["memory"]) or 0))
    if resources:
        params["resources"] = json.dumps(resources)
    flags = ["--head"] if head is None else [f"--address={head}:6379"]
    for key, value in params.items():
        if value != "false":
            flags.append(f"--{key}" if value == "true" else f"--{key}={value}")
    return ["ray", "start", *flags]


def _deploy(head: Namespace, token: str, config: dict[str, object]) -> None:
    """As KubeRay's operator does it; and that nobody does it without the token."""
    url = f"http://{head.address}:8265/api/serve/applications/"
    for headers, wanted in (({}, 401), ({"Authorization": f"Bearer {token}"}, 200)):
        request = urllib.request.Request(url, json.dumps(config).encode(), headers, method="PUT")
        request.add_header("Content-Type", "application/json")
        status = _status(request, 120.0)
        print(f"serveConfigV2 {'with' if headers else 'without'} the token: {status}")
        assert status == wanted


def _show_probes(pods: list[Namespace]) -> None:
    for pod in pods:
        kinds = ("startupProbe", "readinessProbe", "livenessProbe")
        print(f"{pod.name:16} probes", *(f"{kind.removesuffix('Probe')} {_probe(pod, kind)}" for kind in kinds))


def _show_ports(pods: list[Namespace], overlay: Overlay) -> None:
    """What listens, what of it a stranger reaches, and what of it no flag or option has pinned."""
    for pod in pods:
        assert pod.pod is not None
        known = {port: name for name, ports in listening(overlay, pod.pod) for port in ports}
        found = pod.listening()
        open_ports = _scan(pod.address, sorted(found))
        for port, what in sorted(found.items()):
            mark = "stranger: open" if port in open_ports else "stranger: closed"
            print(f"{pod.name:16} {port:5}  {what:28} {known.get(port, '(a free port)'):28} {mark}")


def _scan(address: str, ports: list[int]) -> set[int]:
    code = f"""
import socket, concurrent.futures as f
def test(port):
    try: socket.create_connection(({address!r}, port), 2).close(); return port
    except OSError: return 0
print(*f.ThreadPoolExecutor(64).map(test, {ports}))"""
    return {int(port) for port in _run(f"ip netns exec {STRANGER} {sys.executable} -", text=code).split()} - {0}


def _show_leave(gateways: list[Namespace]) -> None:
    """A stream runs through the first gateway while its pod leaves; the second answers all the time."""
    leaver, other = gateways[0], gateways[1]
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(_ask, leaver, 1800)
        time.sleep(0.5)
        began = time.monotonic()
        hook = leaver.inside("python", "-m", "serve.deployments.leave", "--timeout-s", "60")
        _eventually(lambda: _probe(leaver, "readinessProbe") != 200, "that the leaving gateway is unready")
        print(f"unready {time.monotonic() - began:.1f} s after its pod began to leave; the other says", end=" ")
        print(_probe(other, "readinessProbe"), "and", _ask(other))
        print("the stream through it ended with:", stream.result()[-60:])
        print(f"preStop returned {hook.wait(90)} after {time.monotonic() - began:.1f} s")


def _ask(gateway: Namespace, max_tokens: int = 40) -> str:
    question = "What is 27 + 58?" if max_tokens < 100 else "Tell me a story about a cat."
    body = {"model": "tandem-text", "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens}
    body["ignore_eos"] = max_tokens > 100
    request = urllib.request.Request(
        f"http://{gateway.address}:8100/v1/chat/completions",
        json.dumps({**body, "temperature": 0}).encode(),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def _probe(pod: Namespace, kind: str) -> int:
    assert pod.pod is not None
    asked = pod.pod.spec["containers"][0][kind]["httpGet"]
    return _get(pod, pod.pod.port(asked["port"]) or 0, asked["path"])


def _get(pod: Namespace, port: int, path: str) -> int:
    return _status(urllib.request.Request(f"http://{pod.address}:{port}{path}"))


def _status(request: urllib.request.Request, timeout_s: float = 10.0) -> int:
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def _network(pods: list[Namespace]) -> Iterator[None]:
    stranger = Namespace(None, STRANGER, 250)
    made = [path for path in (Path("/etc/tandem"), Path("/home/tandem")) if not path.exists()]
    for path in made:
        path.mkdir()
    _run("ip link add td-bridge type bridge")
    _run(f"ip addr add {KUBELET}/24 dev td-bridge")
    _run("ip link set td-bridge up")
    try:
        for pod in [*pods, stranger]:
            pod.create()
        yield
    finally:
        for pod in reversed(pods):
            if pod.process is not None:
                pod.process.kill()  # and with it, by unshare's --kill-child, all of the pod
                pod.process.wait()
        for pod in [*pods, stranger]:
            subprocess.run(["ip", "netns", "del", pod.name], check=False, capture_output=True)
        _run("ip link del td-bridge")
        for path in made:
            path.rmdir()


def _eventually(condition, what: str, within_s: float = 400.0) -> None:
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            raise SystemExit(f"not within {within_s:g} s: {what}")
        time.sleep(0.5)


def _run(command: str, text: str | None = None) -> str:
    done = subprocess.run(shlex.split(command), input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr.strip()}")
    return done.stdout


def _end(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows is the clean-up
    sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    socket.setdefaulttimeout(30)
    if os.getuid() != 0:
        raise SystemExit("namespaces need root")
    main()
