//! A real PostgreSQL server, one for the whole test process, with a fresh database for each test.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection};
use tokio::sync::OnceCell;

/// A server on an idle machine is up in a second; this is for a busy one.
const START_DEADLINE: Duration = Duration::from_secs(60);
const USER: &str = "farebox";

/// Ends the server when it, or this process, is gone: the shell waits for its input to end, and
/// only this process holds the other side. The data is thrown away, so the server need not save it.
const KEEPER: &str = r#"
"$POSTGRES" "$@" >"$DIR/log" 2>&1 &
server=$!
read -r nothing
kill -QUIT "$server"
wait "$server"
rm -rf "$DIR"
"#;

struct Server {
    sockets: PathBuf,
    _alive: ChildStdin,
}

static SERVER: OnceCell<Server> = OnceCell::const_new();
static DATABASES: AtomicU32 = AtomicU32::new(0);

/// Creates an empty database and returns its address.
pub async fn fresh_database() -> String {
    let server = SERVER.get_or_init(Server::start).await;
    let name = format!("test_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
    server.run(format!("CREATE DATABASE {name}")).await;
    server.url(&name)
}

/// Drops a database that [`fresh_database`] made, so that many tests need little disk.
pub async fn drop_database(url: &str) {
    let server = SERVER.get_or_init(Server::start).await;
    let name = url.split_once(":///").and_then(|(_, rest)| rest.split('?').next()).unwrap();
    server.run(format!("DROP DATABASE {name} WITH (FORCE)")).await;
}

impl Server {
    async fn start() -> Self {
        let (dir, alive) = tokio::task::spawn_blocking(initialize).await.unwrap();
        let server = Self { sockets: dir, _alive: alive };
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            match PgConnection::connect(&server.url("postgres")).await {
                Ok(connection) => {
                    connection.close().await.unwrap();
                    return server;
                }
                Err(error) if Instant::now() > deadline => {
                    let log = fs::read_to_string(server.sockets.join("log")).unwrap_or_default();
                    panic!("PostgreSQL does not start: {error}\n{log}");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    fn url(&self, database: &str) -> String {
        format!("postgres:///{database}?host={}&user={USER}", self.sockets.display())
    }

    async fn run(&self, statement: String) {
        let mut connection = PgConnection::connect(&self.url("postgres")).await.unwrap();
        connection.execute(AssertSqlSafe(statement)).await.unwrap();
        connection.close().await.unwrap();
    }
}

/// Makes a data directory and starts a server in it.
#[expect(clippy::zombie_processes, reason = "the keeper outlives this process, and then ends by itself")]
fn initialize() -> (PathBuf, ChildStdin) {
    let bin = binaries();
    // Sockets have short paths, so the name is short; its owner is who we are.
    let dir = std::env::temp_dir().join(format!("farebox-pg-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).unwrap();
    let account = account(&dir);
    if let Some((uid, gid)) = account {
        chown(&dir, Some(uid), Some(gid)).unwrap();
    }
    let run_as = |command: &mut Command| {
        if let Some((uid, gid)) = account {
            command.gid(gid).uid(uid);
        }
        command.current_dir(&dir);
    };

    let data = dir.join("data");
    let mut initdb = Command::new(bin.join("initdb"));
    initdb
        .args(["--username", USER, "--auth", "trust", "--encoding", "UTF8", "--locale", "C"])
        .args(["--no-sync", "--pgdata"])
        .arg(&data);
    run_as(&mut initdb);
    let made = initdb.output().unwrap();
    assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));

    let mut keeper = Command::new("sh");
    keeper
        .args(["-c", KEEPER, "keeper", "-D"])
        .arg(&data)
        // Sockets only: no port that another program may want.
        .args(["-c", "listen_addresses=", "-c"])
        .arg(format!("unix_socket_directories={}", dir.display()))
        // Each test has its own pools of connections.
        .args(["-c", "max_connections=400"])
        // What a power cut leaves of PostgreSQL's files is not what is tested here.
        .args(["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off"])
        .env("POSTGRES", bin.join("postgres"))
        .env("DIR", &dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A Ctrl-C is for the tests; the keeper sees them go and then ends the server.
        .process_group(0);
    run_as(&mut keeper);
    let mut child = keeper.spawn().unwrap();
    (dir, child.stdin.take().unwrap())
}

/// Where `initdb` and `postgres` are: $POSTGRES_BIN, or the newest that Debian's packages installed.
fn binaries() -> PathBuf {
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
