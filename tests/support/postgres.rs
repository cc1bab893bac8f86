//! Real PostgreSQL servers: one for the whole test process, with a fresh database for each test, and
//! for tests that kill it one of their own.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use tokio::sync::OnceCell;

/// A server on an idle machine is up in a second; this is for a busy one.
const START_DEADLINE: Duration = Duration::from_secs(60);
const USER: &str = "farebox";

/// Runs the server, and ends it when this process is gone: the shell waits for its input to end, and
/// only this process holds the other side. The data then goes as well, so nothing need be saved. A
/// line says that the server has been killed, and is to be buried and its data kept.
const KEEPER: &str = r#"
"$POSTGRES" "$@" >>"$DIR/log" 2>&1 &
server=$!
read -r killed
[ -n "$killed" ] || kill -QUIT "$server"
wait "$server"
[ -n "$killed" ] || rm -rf "$DIR"
"#;

/// Of the shared server what a power cut leaves is not what is tested.
const FAST: &[&str] = &["fsync=off", "full_page_writes=off", "synchronous_commit=off"];
/// As PostgreSQL is by default, and must be where it keeps money.
const DURABLE: &[&str] = &["fsync=on", "full_page_writes=on", "synchronous_commit=on"];

static SHARED: OnceCell<Postgres> = OnceCell::const_new();
static SERVERS: AtomicU32 = AtomicU32::new(0);
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// Creates an empty database on the shared server and returns its address.
pub async fn fresh_database() -> String {
    shared().await.fresh_database().await
}

/// Drops a database that [`fresh_database`] made, so that many tests need little disk.
pub async fn drop_database(url: &str) {
    shared().await.drop_database(url).await;
}

/// Replaces a database that [`fresh_database`] made by an empty one.
pub async fn empty_database(url: &str) {
    let server = shared().await;
    server.drop_database(url).await;
    server.run(format!("CREATE DATABASE {}", name_of(url))).await;
}

async fn shared() -> &'static Postgres {
    SHARED.get_or_init(|| Postgres::start(FAST)).await
}

fn name_of(url: &str) -> &str {
    url.split_once(":///").and_then(|(_, rest)| rest.split('?').next()).unwrap()
}

/// A running server. Dropped, it ends and takes its data with it.
pub struct Postgres {
    /// Its sockets, its log, and its data.
    dir: PathBuf,
    settings: &'static [&'static str],
    keeper: Child,
    alive: ChildStdin,
}

impl Postgres {
    /// A server of a test's own that saves what it commits, to be killed and started again.
    pub async fn durable() -> Self {
        Self::start(DURABLE).await
    }

    pub async fn fresh_database(&self) -> String {
        let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        self.run(format!("CREATE DATABASE {name}")).await;
        self.url(&name)
    }

    async fn drop_database(&self, url: &str) {
        self.run(format!("DROP DATABASE {} WITH (FORCE)", name_of(url))).await;
    }

    /// Ends the server and all its processes at once, as a power cut would, and waits until they are gone.
    pub fn kill_9(&mut self) {
        let pid_file = fs::read_to_string(self.dir.join("data/postmaster.pid")).unwrap();
        let server: u32 = pid_file.lines().next().unwrap().parse().unwrap();
        // Stopped first, it can start no more processes; each of them has a process group of its own.
        signal("STOP", &[server]);
        let mut all = children(server);
        all.push(server);
        signal("KILL", &all);
        self.alive.write_all(b"killed\n").unwrap();
        self.keeper.wait().unwrap();
        let deadline = Instant::now() + START_DEADLINE;
        while all.iter().any(|pid| is_running(*pid)) {
            assert!(Instant::now() < deadline, "PostgreSQL's processes {all:?} do not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts it on its data again, after [`Self::kill_9`], and waits until it takes connections.
    pub async fn restart(&mut self) {
        (self.keeper, self.alive) = keep(&self.dir, self.settings);
        self.wait_until_ready().await;
    }

    async fn start(settings: &'static [&'static str]) -> Self {
        let dir = tokio::task::spawn_blocking(initialize).await.unwrap();
        let (keeper, alive) = keep(&dir, settings);
        let mut server = Self { dir, settings, keeper, alive };
        server.wait_until_ready().await;
        server
    }

    async fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            match PgConnection::connect(&self.url("postgres")).await {
                Ok(connection) => return connection.close().await.unwrap(),
                Err(error) if Instant::now() > deadline => {
                    panic!("PostgreSQL does not start: {error}\n{}", self.log())
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn url(&self, database: &str) -> String {
        format!("postgres:///{database}?host={}&user={USER}", self.dir.display())
    }

    async fn run(&self, statement: String) {
        let mut connection = PgConnection::connect(&self.url("postgres")).await.unwrap();
        connection.execute(AssertSqlSafe(statement)).await.unwrap();
        connection.close().await.unwrap();
    }
}

/// Makes a directory with an empty data directory in it.
fn initialize() -> PathBuf {
    // Sockets have short paths, so the name is short; its owner is who we are.
    let number = SERVERS.fetch_add(1, Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("farebox-pg-{}-{number}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).unwrap();
    if let Some((uid, gid)) = account(&dir) {
        chown(&dir, Some(uid), Some(gid)).unwrap();
    }
    let mut initdb = in_directory(Command::new(binaries().join("initdb")), &dir);
    initdb
        .args(["--username", USER, "--auth", "trust", "--encoding", "UTF8", "--locale", "C"])
        .args(["--no-sync", "--pgdata"])
        .arg(dir.join("data"));
    let made = initdb.output().unwrap();
    assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
    dir
}

/// Starts a server on a directory's data.
fn keep(dir: &Path, settings: &[&str]) -> (Child, ChildStdin) {
    let mut keeper = in_directory(Command::new("sh"), dir);
    keeper
        .args(["-c", KEEPER, "keeper", "-D"])
        .arg(dir.join("data"))
        // Sockets only: no port that another program may want.
        .args(["-c", "listen_addresses=", "-c"])
        .arg(format!("unix_socket_directories={}", dir.display()))
        // Each test has its own pools of connections.
        .args(["-c", "max_connections=400"])
        .args(settings.iter().flat_map(|setting| ["-c", setting]))
        .env("POSTGRES", binaries().join("postgres"))
        .env("DIR", dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A Ctrl-C is for the tests; the keeper sees them go and then ends the server.
        .process_group(0);
    let mut keeper = keeper.spawn().unwrap();
    let alive = keeper.stdin.take().unwrap();
    (keeper, alive)
}

/// Runs as the owner of a directory, in it.
fn in_directory(mut command: Command, dir: &Path) -> Command {
    let owner = fs::metadata(dir).unwrap();
    if owner.uid() != fs::metadata("/proc/self").unwrap().uid() {
        command.gid(owner.gid()).uid(owner.uid());
    }
    command.current_dir(dir);
    command
}

fn signal(name: &str, processes: &[u32]) {
    let ids = processes.iter().map(u32::to_string);
    // The shell's own kill: a minimal system has no other. One that has ended meanwhile is no loss.
    let sent = Command::new("sh").args(["-c", "kill -s \"$@\"", "kill", name]).args(ids).output();
    sent.unwrap();
}

/// The processes that a process has started and that have not ended.
fn children(parent: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id| status(*id).is_some_and(|(_, its_parent)| its_parent == parent)).collect()
}

fn is_running(process: u32) -> bool {
    status(process).is_some_and(|(state, _)| state != 'Z')
}

/// A process's state and its parent, as proc(5) describes them.
fn status(process: u32) -> Option<(char, u32)> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The program's name is in parentheses, and may have any in it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

/// Where `initdb` and `postgres` are: $POSTGRES_BIN, or the newest that Debian's packages installed.
pub fn binaries() -> PathBuf {
    if let Some(bin) = std::env::var_os("POSTGRES_BIN").filter(|bin| !bin.is_empty()) {
        return bin.into();
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let version = |path: &Path| path.file_name()?.to_str()?.parse::<u32>().ok();
    let newest = versions
        .map(|entry| entry.path())
        .filter(|path| version(path).is_some())
        .max_by_key(|path| version(path));
    newest.expect("PostgreSQL is installed, or POSTGRES_BIN says where it is").join("bin")
}

/// The account that the server runs under where this process is root, which PostgreSQL refuses to be.
fn account(ours: &Path) -> Option<(u32, u32)> {
    if fs::metadata(ours).unwrap().uid() != 0 {
        return None;
    }
    let accounts = fs::read_to_string("/etc/passwd").unwrap();
    let find = |name: &str| {
        let line = accounts.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    Some(find("postgres").or_else(|| find("nobody")).expect("an account without privileges"))
}
