//! Containers whose programs are on this machine, run as processes: with the arguments, environment, files, user and capabilities
//! that the pod says, and with its readiness and liveness probes.
//!
//! A program sees a root of its own: the machine's programs and libraries, and of other files only what the pod mounts. The mounts
//! belong to the process; only a [`sandbox`](crate::sandbox) has the rights for them.
//!
//! In a user namespace, every program runs as that namespace's root, with the capabilities that its pod says.
//!
//! Names of Services are in the file `/etc/hosts` of a container, as of the start of its program.
//!
//! There is no `attach`: a container with `stdin: true` reads a named pipe, and starts when it is opened for writing.
//!
//! Not simulated: limits of resources, seccomp and AppArmor, `exec` and `grpc` probes (an error), and files that change while the
//! pod runs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use futures::FutureExt as _;
use futures::future::LocalBoxFuture;
use serde_json::Value;

use super::workload::{Answers, Containers, Start, Workload};
use crate::process::Process;
use crate::sandbox::{self, Privilege};

mod environment;
mod probes;
mod volumes;

use probes::Probes;

/// How long all init containers of a pod may take: the node waits for them.
const INIT_PATIENCE: Duration = Duration::from_secs(60);

/// The exit code of a program that is killed.
const KILLED: i32 = 128 + 9;

/// What a container may do where its pod does not drop it.
const DEFAULT_CAPABILITIES: [&str; 14] = [
    "chown",
    "dac_override",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "net_bind_service",
    "net_raw",
    "sys_chroot",
    "mknod",
    "audit_write",
    "setfcap",
];

/// Runs the pods of which every container has its program in one folder; the others [answer](Answers).
#[derive(Debug, Clone)]
pub struct Programs {
    programs: PathBuf,
    scratch: PathBuf,
}

impl Programs {
    /// `programs` is the folder with the programs; `scratch` one for logs, volumes and the nodes' own files, which outlive pods.
    pub fn new(programs: &Path, scratch: &Path) -> Self {
        Self { programs: programs.to_owned(), scratch: scratch.to_owned() }
    }

    /// What the containers of this name have written so far, one run after the other.
    pub fn log(&self, namespace: &str, pod: &str, container: &str) -> String {
        std::fs::read_to_string(self.log_file(namespace, pod, container)).unwrap_or_default()
    }

    fn log_file(&self, namespace: &str, pod: &str, container: &str) -> PathBuf {
        self.scratch.join("logs").join(format!("{namespace}_{pod}_{container}.log"))
    }

    /// The named pipe of a container with `stdin: true`. It exists when the container starts.
    pub fn standard_input(&self, namespace: &str, pod: &str, container: &str) -> PathBuf {
        // Not beside the logs, all of which are read.
        self.scratch.join("stdin").join(format!("{namespace}_{pod}_{container}"))
    }

    /// The folder that is `path` for the host paths of a node.
    pub fn host_path(&self, node: &str, path: &str) -> PathBuf {
        self.scratch.join("nodes").join(node).join(path.trim_start_matches('/'))
    }

    /// The name of a container's program: that of its command, or else that of its image.
    fn program(&self, container: &Value) -> Option<PathBuf> {
        let image = container["image"].as_str().unwrap_or_default();
        let image = image.split('@').next().unwrap_or_default();
        let name = image.rsplit('/').next().unwrap_or_default();
        let name = container["command"][0].as_str().unwrap_or_else(|| name.split(':').next().unwrap_or_default());
        let program = self.programs.join(Path::new(name).file_name()?);
        program.is_file().then_some(program)
    }

    async fn run(&self, start: &Start<'_>) -> anyhow::Result<Box<dyn Containers>> {
        let pod = serde_json::to_value(start.pod).context("read the pod")?;
        let all = containers(&pod, "initContainers").chain(containers(&pod, "containers"));
        if all.into_iter().any(|container| self.program(container).is_none()) {
            return Answers.start(start).await;
        }
        let volumes = volumes::prepare(&self.scratch, start, &pod).await?;
        for container in containers(&pod, "initContainers") {
            ensure!(container["restartPolicy"].is_null(), "a sidecar among the init containers is not simulated");
            let mut process = self.spawn(start, &pod, container, &volumes).await?;
            let mut code = None;
            let ended = crate::kubernetes::until(INIT_PATIENCE, async || {
                code = process.exit_code();
                code.is_some()
            });
            if ended.await.is_none() || code != Some(0) {
                bail!("init container {} did not succeed:\n{}", container["name"], process.log());
            }
        }
        let mut running = Running { probes: Vec::new(), processes: Vec::new() };
        for container in containers(&pod, "containers") {
            running.processes.push(self.spawn(start, &pod, container, &volumes).await?);
            running.probes.push(Probes::start(start, container)?);
        }
        Ok(Box::new(running))
    }

    async fn spawn(
        &self,
        start: &Start<'_>,
        pod: &Value,
        container: &Value,
        volumes: &BTreeMap<String, PathBuf>,
    ) -> anyhow::Result<Process> {
        let name = container["name"].as_str().unwrap_or_default();
        let spawned = async {
            let variables = environment::variables(start, pod, container).await?;
            let program = self.program(container).context("the container has a program")?;
            let mut script = self.script(pod, container, volumes, &variables)?;
            let root = self.scratch.join("roots").join(pod["metadata"]["uid"].as_str().unwrap_or_default()).join(name);
            std::fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
            // The root is mounted over the folder.
            let hosts = root.with_extension("hosts");
            std::fs::write(&hosts, environment::hosts(start, pod).await?).context("write the names of Services")?;
            let metadata = &pod["metadata"];
            let text = |key: &str| metadata[key].as_str().unwrap_or_default();
            let log = self.log_file(text("namespace"), text("name"), name);
            std::fs::create_dir_all(log.parent().context("a log is in a folder")?)
                .context("create the folder of logs")?;
            if container["stdin"] == true {
                let pipe = self.standard_input(text("namespace"), text("name"), name);
                std::fs::create_dir_all(self.scratch.join("stdin")).context("create the folder of pipes")?;
                let pipe = quote(&pipe.to_string_lossy());
                script.insert_str(0, &format!("rm -f {pipe}; mkfifo -m 600 {pipe}; exec <{pipe}\n"));
            }
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation=private", "sh", "-ec"]).arg(script).arg("sh");
            command.arg(root).arg(hosts).arg(program);
            let texts = |list: &Value| -> Vec<String> {
                list.as_array().into_iter().flatten().filter_map(|it| it.as_str().map(str::to_owned)).collect()
            };
            let arguments = texts(&container["command"]).into_iter().skip(1).chain(texts(&container["args"]));
            command.args(arguments.map(|text| environment::expand(&text, &variables)));
            // Nothing of the test's environment reaches the program, not even through those that start it.
            for (name, _) in std::env::vars_os() {
                command.env_remove(name);
            }
            command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
            command.envs(variables);
            start.network.enter(|| Process::start_bound(command, &log)).context("start the program")
        };
        spawned.await.with_context(|| format!("container {name}"))
    }

    /// Makes the container's root at `$1` with the file `hosts` of `$2`, and becomes the program `$3` in it with the arguments after it.
    fn script(
        &self,
        pod: &Value,
        container: &Value,
        volumes: &BTreeMap<String, PathBuf>,
        variables: &BTreeMap<String, String>,
    ) -> anyhow::Result<String> {
        let security = |key: &str| match &container["securityContext"][key] {
            Value::Null => &pod["spec"]["securityContext"][key],
            of_container => of_container,
        };
        let is = |key: &str| security(key) == &Value::Bool(true);
        let mut script = "root=$1; hosts=$2; shift 2\nmount -t tmpfs -o mode=0755 root \"$root\"\n".to_owned();
        script.push_str(
            "for it in usr bin sbin lib lib64; do\n\
             if [ -L /$it ]; then cp -P /$it \"$root/$it\"\n\
             elif [ -d /$it ]; then mkdir \"$root/$it\"; mount --bind -o ro /$it \"$root/$it\"; fi\n\
             done\n\
             mkdir \"$root/etc\" \"$root/proc\" \"$root/dev\" \"$root/sys\" \"$root/tmp\"; chmod 1777 \"$root/tmp\"\n\
             cp /etc/ld.so.cache \"$root/etc\"; cp \"$hosts\" \"$root/etc/hosts\"\n\
             echo 'hosts: files' >\"$root/etc/nsswitch.conf\"; chmod 644 \"$root/etc/hosts\" \"$root/etc/nsswitch.conf\"\n\
             for it in proc dev sys; do mount --rbind /$it \"$root/$it\"; done\n",
        );
        if !is("privileged") {
            // As container runtimes do: settings of the kernel are not for pods.
            script.push_str(
                "mount --bind \"$root/proc/sys\" \"$root/proc/sys\"; mount -o remount,bind,ro,nosuid,nodev,noexec \"$root/proc/sys\"\n",
            );
        }
        let programs = quote(&self.programs.to_string_lossy());
        writeln!(script, "mkdir -p \"$root\"{programs}; mount --bind -o ro {programs} \"$root\"{programs}")?;
        let mut mounts: Vec<&Value> = container["volumeMounts"].as_array().into_iter().flatten().collect();
        // One may be inside another.
        mounts.sort_by_key(|mount| mount["mountPath"].as_str().map(str::len));
        for mount in mounts {
            let name = mount["name"].as_str().unwrap_or_default();
            let volume = volumes.get(name).with_context(|| format!("volume {name} is not defined"))?;
            let below = mount["subPathExpr"].as_str().map(|it| environment::expand(it, variables));
            let below = below.or_else(|| mount["subPath"].as_str().map(str::to_owned)).unwrap_or_default();
            let source = quote(&volume.join(below.trim_start_matches('/')).to_string_lossy());
            let at = format!("\"$root\"{}", quote(mount["mountPath"].as_str().unwrap_or_default()));
            writeln!(script, "if [ ! -e {source} ]; then mkdir -p {source}; fi")?;
            writeln!(script, "if [ -d {source} ]; then mkdir -p {at}; else mkdir -p $(dirname {at}); touch {at}; fi")?;
            writeln!(script, "mount --bind {source} {at}")?;
            if mount["readOnly"] == true {
                writeln!(script, "mount -o remount,bind,ro,nosuid,nodev {at}")?;
            }
        }
        if is("readOnlyRootFilesystem") {
            script.push_str("mount -o remount,bind,ro \"$root\"\n");
        }
        let number = |key: &str| security(key).as_u64();
        let user = number("runAsUser").unwrap_or(0);
        ensure!(user != 0 || !is("runAsNonRoot"), "runAsNonRoot is set, and the user is 0");
        let group = number("runAsGroup").unwrap_or(0);
        script.push_str("exec chroot \"$root\" setpriv");
        if has_users() {
            write!(script, " --reuid={user} --regid={group}")?;
            match pod["spec"]["securityContext"]["fsGroup"].as_u64() {
                Some(group) => write!(script, " --groups={group}")?,
                None => script.push_str(" --clear-groups"),
            }
        }
        if !is("privileged") {
            write!(
                script,
                " --bounding-set={} --inh-caps=-all --ambient-caps=-all",
                capabilities(security("capabilities"))
            )?;
        }
        if security("allowPrivilegeEscalation") == &Value::Bool(false) {
            script.push_str(" --no-new-privs");
        }
        script.push_str(" --pdeathsig=KILL \"$@\"\n");
        Ok(script)
    }
}

impl Workload for Programs {
    fn start<'a>(&'a self, start: &'a Start<'a>) -> LocalBoxFuture<'a, anyhow::Result<Box<dyn Containers>>> {
        self.run(start).boxed_local()
    }
}

fn containers<'a>(pod: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    pod["spec"][key].as_array().into_iter().flatten()
}

/// For `setpriv`: all that are not named are dropped.
fn capabilities(capabilities: &Value) -> String {
    let names = |key: &str| -> Vec<String> {
        let list = capabilities[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        list.map(|it| it.to_lowercase().trim_start_matches("cap_").to_owned()).collect()
    };
    let (dropped, added) = (names("drop"), names("add"));
    let is_dropped = |name: &str| dropped.iter().any(|it| it == name || it == "all");
    let kept = DEFAULT_CAPABILITIES.into_iter().filter(|name| !is_dropped(name)).map(str::to_owned);
    let mut set = "-all".to_owned();
    for name in kept.chain(added) {
        set.push_str(",+");
        set.push_str(&name);
    }
    set
}

/// Whether programs can run as the users that their pods name. A user namespace has its own root only.
fn has_users() -> bool {
    sandbox::privilege() != Some(Privilege::UserNamespace)
}

/// For a shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

struct Running {
    /// They end before the processes, whose end they would report.
    probes: Vec<Probes>,
    processes: Vec<Process>,
}

impl Containers for Running {
    fn is_ready(&mut self) -> bool {
        self.probes.iter().all(Probes::is_ready)
    }

    fn ended(&mut self) -> Option<i32> {
        if !self.probes.iter().all(Probes::is_live) {
            return Some(KILLED);
        }
        let codes: Vec<Option<i32>> = self.processes.iter_mut().map(Process::exit_code).collect();
        // One that fails ends its pod's others here, too: they start again together.
        if let Some(failed) = codes.iter().flatten().find(|code| **code != 0) {
            return Some(*failed);
        }
        codes.iter().all(Option::is_some).then_some(0)
    }

    fn stop(&mut self) {
        for process in &self.processes {
            // It may have ended by itself.
            drop(process.terminate());
        }
    }

    fn has_stopped(&mut self) -> bool {
        self.processes.iter_mut().all(|process| process.exit_code().is_some())
    }
}
