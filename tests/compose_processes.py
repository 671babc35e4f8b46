"""The services of deploy/compose.yaml as plain processes, with the file's own commands, environment, order and checks.

What a container engine would supply is supplied here: host names become 127.0.0.1, ports free ones, volumes
directories, and the image's environment comes from the ENV lines of deploy/Dockerfile. PATH is all that is inherited.
"""

import os
import pwd
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from seaweed import free_ports

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
HEALTHY_WITHIN_SECONDS = 400
CONTAINER_PORTS = {"server": "4200", "postgres": "5432", "store": "8333", "worker": "8080"}
WEED_INNER_PORTS = (
    "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
    "filer.port", "filer.port.grpc", "admin.port", "admin.port.grpc", "webdav.port",
)  # fmt: skip


def postgres_binaries() -> Path | None:
    """The directory of initdb and postgres, or None; Debian keeps it off PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


@dataclass
class ComposeProcesses:
    """Started with `up()`, ended with `down()`; `directory` holds every volume and log and must be ours alone."""

    directory: Path
    secrets: dict[str, str]
    """What deploy/.env would hold."""
    services: dict[str, Any] = field(init=False)
    ports: dict[str, int] = field(init=False)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    start_up_seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
        numbers = free_ports(len(CONTAINER_PORTS) + len(WEED_INNER_PORTS))
        self.ports = dict(zip((*CONTAINER_PORTS, *WEED_INNER_PORTS), numbers, strict=True))
        for path in ("data", "scratch", "app/deploy", "home"):
            (self.directory / path).mkdir(parents=True)
        for name in ("prefect.yaml", "automations.yaml", "automations.sh"):
            shutil.copy(DEPLOY / name, self.directory / "app/deploy" / name)

    def up(self) -> None:
        """Every service in the order the file's depends_on asks for."""
        while waiting := [name for name in self.services if name not in self.processes]:
            ready = [name for name in waiting if set(self.services[name].get("depends_on", {})) <= set(self.processes)]
            for name in ready:
                for dependency, how in self.services[name].get("depends_on", {}).items():
                    self.wait_for(dependency, how["condition"])
                self.start(name)

    def start(self, name: str) -> None:
        if name == "postgres":
            self._initialize_postgres()
        with self.log(name).open("ab") as output:
            self.processes[name] = subprocess.Popen(
                self.command(name),
                env=self.environment(name),
                cwd=self.directory if name == "postgres" else self.directory / "app",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                **self._identity(name),
            )

    def down(self) -> dict[str, float]:
        """SIGTERM to each in reverse order, as `docker compose down`; seconds until each had ended."""
        seconds = {}
        for name, process in reversed(self.processes.items()):
            began = time.monotonic()
            process.terminate()
            try:
                process.wait(timeout=float(self.services[name].get("stop_grace_period", "10s").removesuffix("s")))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                seconds[name] = float("inf")
            else:
                seconds[name] = time.monotonic() - began
        return seconds

    def run(self, name: str, *command: str, timeout_seconds: float) -> subprocess.CompletedProcess[str]:
        """`docker compose exec NAME COMMAND`."""
        return subprocess.run(
            [self._located(command[0]), *command[1:]],
            env=self.environment(name),
            cwd=self.directory / "app",
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def command(self, name: str) -> list[str]:
        """The container's command line here: entrypoint and command, and what the image's own entrypoint adds."""
        service = self.services[name]
        words = [self.here(word) for word in [*service.get("entrypoint", []), *service["command"]]]
        if name == "postgres":
            sockets = self.directory / "pg"
            words += ["-D", f"{sockets}/data", "-k", str(sockets), "-h", "127.0.0.1", "-p", str(self.ports[name])]
        if name == "store":
            words += [f"-{flag}={self.ports[flag]}" for flag in WEED_INNER_PORTS]
        return [self._located(words[0]), *words[1:]]

    def environment(self, name: str) -> dict[str, str]:
        """PATH and HOME, then the image's ENV where the image is ours, then the service's."""
        binaries = postgres_binaries()
        base = {
            "PATH": f"{Path(sys.executable).parent}:{binaries}:/usr/bin:/bin",
            "HOME": str(self.directory / "home"),
            "PGPORT": str(self.ports["postgres"]),
            "OMP_NUM_THREADS": "1",
        }
        if "PYTHONPATH" in os.environ:  # a checkout that is not the installed one
            base["PYTHONPATH"] = os.environ["PYTHONPATH"]
        ours = self.services[name]["image"].startswith("relora-train")
        image = {key: self.here(value) for key, value in image_environment().items() if ours and key != "PATH"}
        declared = self.services[name].get("environment", {})
        own = {key: "127.0.0.1" if value in self.services else self.here(value) for key, value in declared.items()}
        scratch = str(self.directory / "scratch" / name)  # a container's own file system, or its volume
        return {key: value.replace("/var/lib/relora", scratch) for key, value in {**base, **image, **own}.items()}

    def here(self, text: str) -> str:
        """A word of the compose file or the image, with what is called differently outside a container."""
        text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: self.secrets[found[1]], text.replace("$$", "$"))
        text = with_defaults(text)
        for service, port in CONTAINER_PORTS.items():
            text = text.replace(f"//{service}:", "//127.0.0.1:")
            text = re.sub(rf"(?<!\d){port}(?!\d)", str(self.ports[service]), text)
        text = text.replace("0.0.0.0", "127.0.0.1")
        return text.replace("-dir=/data", f"-dir={self.directory / 'data'}")

    def wait_for(self, name: str, condition: str) -> None:
        process, began = self.processes[name], time.monotonic()
        if name in self.start_up_seconds:
            return
        if condition == "service_completed_successfully":
            assert process.wait(timeout=HEALTHY_WITHIN_SECONDS) == 0, self._said(name)
        else:
            check = [self.here(word) for word in self.services[name]["healthcheck"]["test"][1:]]
            while self._fails(name, check):
                assert process.poll() is None, f"{name} ended: {self._said(name)}"
                assert time.monotonic() - began < HEALTHY_WITHIN_SECONDS, f"{name} is unhealthy: {self._said(name)}"
                time.sleep(0.2)
        self.start_up_seconds[name] = time.monotonic() - began

    def _fails(self, name: str, check: list[str]) -> bool:
        environment = self.environment(name)
        check = [self._located(check[0]), *check[1:]]
        return subprocess.run(check, env=environment, capture_output=True, timeout=30, check=False).returncode != 0

    def _said(self, name: str) -> str:
        return self.log(name).read_text(errors="replace")[-3000:]

    def _located(self, program: str) -> str:
        path = self.environment("postgres")["PATH"]
        found = shutil.which(program, path=path)
        assert found, f"{program} is not installed: looked in {path}"
        return found

    def _identity(self, name: str) -> dict[str, Any]:
        """PostgreSQL refuses to run as root."""
        if name != "postgres" or os.geteuid() != 0:
            return {}
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
        return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}

    def _initialize_postgres(self) -> None:
        """What the image's entrypoint does on an empty volume: a cluster with that user, password and database."""
        directory, own = self.directory / "pg", self.environment("postgres")
        directory.mkdir()
        password = directory / "password"
        password.write_text(own["POSTGRES_PASSWORD"])
        identity = self._identity("postgres")
        if identity:
            for path in (directory, password):
                os.chown(path, pwd.getpwnam(identity["user"]).pw_uid, identity["group"])
        binaries = postgres_binaries()
        assert binaries is not None
        user, database = own["POSTGRES_USER"], own["POSTGRES_DB"]
        with ExitStack() as held:
            output = held.enter_context(self.log("initdb").open("ab"))
            subprocess.run(
                [
                    str(binaries / "initdb"), f"--pgdata={directory}/data", f"--username={user}",
                    "--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8", "--locale=C.UTF-8",
                ],
                env=own, cwd=directory, stdout=output, stderr=output, check=True, **identity,
            )  # fmt: skip
            subprocess.run(
                [str(binaries / "postgres"), "--single", "-D", f"{directory}/data", "postgres"],
                input=f'CREATE DATABASE "{database}"\n'.encode(),
                env=own, cwd=directory, stdout=output, stderr=output, check=True, **identity,
            )  # fmt: skip
        password.unlink()


def with_defaults(text: str) -> str:
    """What compose makes of `${NAME:-default}` for an empty .env; a default may hold another one."""
    while (expanded := re.sub(r"\$\{\w+:-([^${}]*)\}", r"\1", text)) != text:
        text = expanded
    return text


def image_environment() -> dict[str, str]:
    """The ENV of the Dockerfile's last stage."""
    last_stage = (DEPLOY / "Dockerfile").read_text().rpartition("FROM ")[2]
    (declared,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", last_stage, flags=re.MULTILINE)
    return dict(pair.split("=", 1) for pair in declared.replace("\\\n", " ").split())
