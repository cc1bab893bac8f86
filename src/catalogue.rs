//! `farebox catalog`: public price lists made into `[[models]]`, and held against what is served.

use std::path::Path;
use std::time::Duration;

use clap::{Args, Subcommand};
use farebox::pricelist::{self, Listing, PriceList, Source};

use crate::{Failure, load};

/// Models that are left out are named, these many for each reason; `--verbose` names all.
const NAMED: usize = 3;
/// From asking for a list to having all of it.
const FETCH_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Subcommand)]
pub enum CatalogCommand {
    /// Print a price list's models as [[models]] of farebox.toml, at cost. What it says that has no place
    /// there is reported on standard error.
    Import {
        #[command(flatten)]
        list: ListArgs,
        /// Only models whose provider/name has this in it; given more than once, any of them.
        #[arg(long, value_name = "TEXT")]
        filter: Vec<String>,
    },
    /// Compare the prices that are served with those of a list. Exits 1 if any is different.
    Diff {
        #[command(flatten)]
        list: ListArgs,
    },
}

#[derive(Args)]
pub struct ListArgs {
    /// A file, or an http(s) URL: LiteLLM's model_prices_and_context_window.json, models.dev's api.json or
    /// OpenRouter's /api/v1/models.
    #[arg(value_name = "FILE_OR_URL")]
    from: String,
    /// Whose list it is; its shape says so otherwise.
    #[arg(long, value_parser = Source::NAMES)]
    source: Option<String>,
    /// A provider of the list's under the name that it has here; may be given more than once.
    #[arg(long, value_name = "LISTED=SERVED", value_parser = renaming)]
    rename: Vec<(String, String)>,
    /// Name every model that is left out.
    #[arg(long)]
    verbose: bool,
}

fn renaming(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((listed, served)) if !listed.is_empty() && !served.is_empty() && !served.contains('/') => {
            Ok((listed.to_owned(), served.to_owned()))
        }
        _ => Err("write it as LISTED=SERVED, such as vertex_ai-language-models=google"),
    }
}

pub async fn run(path: &Path, command: CatalogCommand) -> Result<(), Failure> {
    match command {
        CatalogCommand::Import { list, filter } => import(&list, &filter).await,
        CatalogCommand::Diff { list } => diff(path, &list).await,
    }
}

async fn import(args: &ListArgs, filter: &[String]) -> Result<(), Failure> {
    let list = args.read().await?;
    let is_wanted = |listing: &&Listing| {
        let id = listing.id();
        filter.is_empty() || filter.iter().any(|text| id.contains(text.as_str()))
    };
    let wanted: Vec<_> = list.listings.iter().filter(is_wanted).collect();
    // All of it at once: whoever reads it may stop before its end, which is no failure of ours.
    let text: Vec<_> = wanted.iter().map(|listing| pricelist::to_toml(listing)).collect();
    print(&text.join("\n"))?;
    report(&list, args.verbose);
    eprintln!("{} of {} models are printed", wanted.len(), list.listings.len());
    if wanted.is_empty() {
        return Err(Failure { status: 1, message: "no model of the list is asked for by --filter".into() });
    }
    Ok(())
}

fn print(text: &str) -> Result<(), Failure> {
    use std::io::Write as _;
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

async fn diff(path: &Path, args: &ListArgs) -> Result<(), Failure> {
    let config = load(path)?;
    let list = args.read().await?;
    let (mut same, mut different, mut not_listed) = (0, 0, 0);
    for offer in config.catalog.iter() {
        let is_it =
            |listing: &&Listing| listing.provider == offer.provider && listing.name == offer.upstream_model;
        let Some(listing) = list.listings.iter().find(is_it) else {
            eprintln!("{}: {}/{} is not listed", offer.id, offer.provider, offer.upstream_model);
            not_listed += 1;
            continue;
        };
        let found = pricelist::compare(offer, listing);
        for difference in &found {
            println!("{} {difference}", offer.id);
        }
        if found.is_empty() { same += 1 } else { different += 1 }
    }
    eprintln!("{same} models are priced as listed, {different} otherwise, {not_listed} are not listed");
    if different > 0 {
        return Err(Failure { status: 1, message: "prices differ from the list's".into() });
    }
    Ok(())
}

impl ListArgs {
    async fn read(&self) -> Result<PriceList, Failure> {
        let source = self.source.as_deref().map(str::parse).transpose();
        let source = source.map_err(|message| Failure { status: 2, message })?;
        let text = self.fetch().await?;
        let mut list = PriceList::read(source, &text)
            .map_err(|e| Failure { status: 2, message: format!("{}: {e}", self.from) })?;
        for listing in &mut list.listings {
            if let Some((_, served)) = self.rename.iter().find(|(listed, _)| *listed == listing.provider) {
                listing.provider = served.clone();
            }
        }
        Ok(list)
    }

    async fn fetch(&self) -> Result<String, Failure> {
        if !self.from.starts_with("http://") && !self.from.starts_with("https://") {
            return std::fs::read_to_string(&self.from)
                .map_err(|e| Failure { status: 2, message: format!("{}: {e}", self.from) });
        }
        farebox::install_crypto();
        let client = reqwest::Client::builder().timeout(FETCH_TIMEOUT).build()?;
        let answer = client.get(&self.from).send().await?.error_for_status()?;
        Ok(answer.text().await?)
    }
}

/// What of a list is not among its models here, on standard error.
fn report(list: &PriceList, is_verbose: bool) {
    for (key, models) in &list.not_mapped {
        eprintln!("not mapped: {key} ({models} models)");
    }
    for (why, models) in &list.left_out {
        let shown = if is_verbose { models.len() } else { NAMED.min(models.len()) };
        let more = if shown < models.len() { ", …" } else { "" };
        eprintln!("left out, {why}: {} models ({}{more})", models.len(), models[..shown].join(", "));
    }
}
