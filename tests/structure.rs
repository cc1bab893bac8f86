//! The rules by which the source is laid out, held by reading it: imports go one way, and what is
//! special to one place stays there.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::support::project_root;

/// Every module, bottom first, and the modules it may name.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("money", &[]),
    ("clock", &[]),
    ("id", &[]),
    ("tasks", &[]),
    ("failpoint", &[]),
    ("db", &["money", "clock", "id"]),
    // Pure: no clock, no database, no network.
    ("pricing", &["money"]),
    ("formats", &["money", "pricing"]),
    ("pricelist", &["money", "formats", "pricing"]),
    ("limits", &["clock", "id", "db"]),
    ("config", &["money", "id", "pricing", "formats", "limits"]),
    ("claims", &["clock", "id", "db"]),
    ("ledger", &["money", "clock", "id", "tasks", "db", "pricing", "claims"]),
    ("chain", &["money", "clock", "id", "config"]),
    ("auth", &["money", "clock", "id", "db", "config", "chain"]),
    ("attest", &["clock", "id", "db", "config", "formats", "chain", "auth"]),
    ("payments", &["money", "clock", "id", "tasks", "failpoint", "db", "config", "ledger", "chain"]),
    ("providers", &["formats", "config"]),
    (
        "metering",
        &[
            "money",
            "clock",
            "id",
            "db",
            "tasks",
            "pricing",
            "formats",
            "claims",
            "limits",
            "ledger",
            "auth",
            "providers",
        ],
    ),
    ("audit", &["money", "id", "db", "ledger", "chain", "payments"]),
    ("reserves", &["money", "clock", "id", "failpoint", "db", "config", "chain", "auth", "attest"]),
    ("archive", &["money", "clock", "id", "failpoint", "db", "claims", "ledger"]),
    (
        "app",
        &[
            "clock",
            "config",
            "db",
            "id",
            "tasks",
            "attest",
            "auth",
            "ledger",
            "limits",
            "chain",
            "claims",
            "payments",
            "pricing",
            "providers",
            "metering",
            "telemetry",
        ],
    ),
    // Its gauges are read from the app, which keeps them fresh: the two are one layer.
    ("telemetry", &["app", "config", "ledger", "payments"]),
    (
        "http",
        &[
            "app",
            "archive",
            "attest",
            "auth",
            "claims",
            "clock",
            "db",
            "formats",
            "id",
            "ledger",
            "limits",
            "metering",
            "money",
            "payments",
            "pricing",
            "providers",
            "reserves",
            "tasks",
            "telemetry",
        ],
    ),
];

/// Crates that stay where they are understood.
const CRATE_ONLY_IN: &[(&str, &[&str])] = &[
    ("axum", &["http/", "main.rs"]),
    ("tower_http", &["http/"]),
    ("sqlx", &["db.rs", "ledger/batch/postgres_store.rs"]),
    ("rusqlite", &["db.rs", "ledger/batch/sqlite_store.rs"]),
    ("alloy", &["attest/", "chain/", "auth/siwe.rs", "payments/", "id.rs", "telemetry.rs", "audit/"]),
    ("clap", &["main.rs", "operate.rs", "catalogue.rs"]),
];

const SQL: &[&str] = &["SELECT ", "INSERT INTO ", "UPDATE ", "DELETE FROM "];

/// A source file: its path under `src/` and its text.
type Source = (String, String);

#[test]
fn the_source_keeps_its_layout() {
    let sources = read_sources();
    assert!(sources.len() > 30, "the source is not where this test looks for it");
    assert_eq!(violations(&sources), Vec::<String>::new());
}

#[test]
fn the_modules_of_the_library_are_all_ruled() {
    let (_, lib) = read_sources().into_iter().find(|(path, _)| path == "lib.rs").unwrap();
    let declared: BTreeSet<_> =
        lib.lines().filter_map(|line| line.trim().strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let ruled: BTreeSet<_> = MAY_IMPORT.iter().map(|(module, _)| *module).collect();
    assert_eq!(declared, ruled);
}

#[test]
fn no_migration_is_forgotten() {
    let known = fs::read_to_string(project_root().join("src/db.rs")).unwrap();
    let mut files = 0;
    for directory in ["migrations", "migrations/sqlite", "migrations/postgres"] {
        for entry in fs::read_dir(project_root().join(directory)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            if name.ends_with(".sql") {
                files += 1;
                assert!(known.contains(&format!("../{directory}/{name}\"")), "{directory}/{name} is not run");
            }
        }
    }
    assert!(files > 10, "the migrations are not where this test looks for them");
}

#[test]
fn a_breach_of_the_layout_is_seen() {
    let breach = |path: &str, text: &str| violations(&[(path.to_owned(), text.to_owned())]);
    assert_eq!(breach("pricing/charge.rs", "use crate::money::MicroUsdc;"), Vec::<String>::new());
    assert_eq!(breach("pricing/charge.rs", "use crate::db::Db;"), ["pricing/charge.rs:1 imports db"]);
    assert_eq!(breach("ledger/mod.rs", "\n    crate::http::json()"), ["ledger/mod.rs:2 imports http"]);
    assert_eq!(breach("ledger/mod.rs", "// crate::http is above"), Vec::<String>::new());
    assert_eq!(breach("metering.rs", "use axum::body::Body;"), ["metering.rs:1 uses axum"]);
    assert_eq!(breach("ledger/mod.rs", "sqlx::query(text)"), ["ledger/mod.rs:1 uses sqlx"]);
    assert_eq!(breach("http/usage.rs", "let q = \"SELECT 1\";"), ["http/usage.rs:1 holds SQL"]);
    assert_eq!(breach("ledger/store.rs", "let q = \"SELECT 1\";"), Vec::<String>::new());
    assert_eq!(breach("http/usage.rs", "let relaxum::y = 1;"), Vec::<String>::new());
}

fn violations(sources: &[Source]) -> Vec<String> {
    let mut found = Vec::new();
    for (path, text) in sources {
        let module = path.split(['/', '.']).next().unwrap_or_default();
        let may_import = MAY_IMPORT.iter().find(|(name, _)| *name == module).map(|(_, allowed)| *allowed);
        for (at, line) in text.lines().enumerate() {
            let place = format!("{path}:{}", at + 1);
            let code = line.split("//").next().unwrap_or_default();
            for imported in names_after(code, "crate::") {
                let is_module = MAY_IMPORT.iter().any(|(name, _)| *name == imported);
                let allowed =
                    may_import.is_none_or(|allowed| allowed.contains(&imported) || imported == module);
                if is_module && !allowed {
                    found.push(format!("{place} imports {imported}"));
                }
            }
            for (name, homes) in CRATE_ONLY_IN {
                let at_home =
                    homes.iter().any(|home| path == home || (home.ends_with('/') && path.starts_with(home)));
                if !at_home && names_after(code, &format!("{name}::")).next().is_some() {
                    found.push(format!("{place} uses {name}"));
                }
            }
            let may_hold_sql = path == "db.rs" || path.ends_with("store.rs");
            if !may_hold_sql && SQL.iter().any(|word| code.contains(word)) {
                found.push(format!("{place} holds SQL"));
            }
        }
    }
    found
}

/// The identifiers, or what else, that follow `prefix` where it is a path of its own.
fn names_after<'a>(code: &'a str, prefix: &str) -> impl Iterator<Item = &'a str> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(prefix).filter_map(move |(at, found)| {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| is_word(c) || c == ':') {
            return None;
        }
        let rest = &code[at + found.len()..];
        Some(rest.split(|c| !is_word(c)).next().unwrap_or_default())
    })
}

fn read_sources() -> Vec<Source> {
    let root = project_root().join("src");
    let mut sources = Vec::new();
    read_into(&root, &root, &mut sources);
    sources
}

fn read_into(root: &Path, directory: &Path, sources: &mut Vec<Source>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_into(root, &path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
            sources.push((name, fs::read_to_string(&path).unwrap()));
        }
    }
}
