//! From request head and model name to a pool.
//!
//! Configured routes are tried first, in order, and all conditions of a route must hold; then the
//! model's name decides; then, with a single pool, that pool takes everything. The table is built
//! once per snapshot and a look-up allocates nothing. What is not done here: reading the body for
//! the model's name ([`Table::needs_model`] says whether that is worth it), and choosing a backend.

use std::collections::HashMap;
use std::time::Duration;

use http::{HeaderMap, HeaderName};

use super::retry::Replay;

/// One rule. A condition that is absent or empty always holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Route {
    /// Name of the pool that takes the request.
    pub pool: String,
    /// Path begins with these whole segments: `/v1` holds for `/v1` and `/v1/models`, not for `/v1beta`.
    pub path_prefix: Option<String>,
    /// Host without its port, in lower case: exact, or `*.suffix` for any name below it.
    pub host: Option<String>,
    /// Header fields that must be there with exactly this value.
    pub headers: Vec<(HeaderName, String)>,
    /// Model names, exact or with a trailing `*`; one of them must match.
    pub models: Vec<String>,
    /// Instead of the pool's own rule for replaying.
    pub replay: Option<Replay>,
    /// Instead of the pool's own total clock.
    pub total: Option<Duration>,
}

/// What a pool says about model names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolModels {
    /// Its name, unique.
    pub name: String,
    /// Model names it serves by configuration.
    pub models: Vec<String>,
    /// Client's name → the backends' name.
    pub aliases: Vec<(String, String)>,
}

/// What of a request is known before its body.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// Path as sent, without the query.
    pub path: &'a str,
    /// `Host` or `:authority`, as sent.
    pub host: Option<&'a str>,
    /// All header fields.
    pub headers: &'a HeaderMap,
}

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Routed<'t> {
    /// Index of the pool.
    pub pool: usize,
    /// Index of the configured route that decided, for its overrides.
    pub rule: Option<usize>,
    /// The model name to send instead of the client's.
    pub rename: Option<&'t str>,
}

/// Why a request goes nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoRoute<'t> {
    /// No pool is known to serve the model.
    UnknownModel {
        /// Names known by configuration, sorted; what backends list is for the caller to add.
        models: &'t [String],
    },
    /// There is no pool at all.
    NoPool,
}

/// All routes and model names of one configuration.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rules: Vec<Rule>,
    pools: Vec<PoolNames>,
    /// Model or alias → the first pool that names it.
    by_model: HashMap<String, usize>,
    known: Vec<String>,
}

/// A route, compiled.
#[derive(Clone, Debug)]
struct Rule {
    pool: usize,
    path_prefix: Option<String>,
    host: Option<HostPattern>,
    headers: Vec<(HeaderName, String)>,
    models: Vec<ModelPattern>,
    /// Index among the configured routes.
    index: usize,
}

#[derive(Clone, Debug)]
enum HostPattern {
    Exact(String),
    /// With its leading dot.
    Below(String),
}

#[derive(Clone, Debug)]
enum ModelPattern {
    Exact(String),
    Prefix(String),
}

#[derive(Clone, Debug)]
struct PoolNames {
    aliases: HashMap<String, String>,
    names_models: bool,
}

impl Table {
    /// Compiles `routes` for `pools`, which are numbered as given. A route to a pool that is not
    /// there is left out: the configuration refuses it earlier.
    pub fn new(routes: &[Route], pools: &[PoolModels]) -> Self {
        let rules: Vec<Rule> = routes
            .iter()
            .enumerate()
            .filter_map(|(index, route)| {
                let pool = pools.iter().position(|pool| pool.name == route.pool)?;
                Some(Rule::new(index, pool, route))
            })
            .collect();
        let mut by_model = HashMap::new();
        for (index, pool) in pools.iter().enumerate() {
            for name in pool.aliases.iter().map(|(alias, _)| alias).chain(&pool.models) {
                by_model.entry(name.clone()).or_insert(index);
            }
        }
        let exact = rules.iter().flat_map(|rule| &rule.models).filter_map(|pattern| match pattern {
            ModelPattern::Exact(name) => Some(name.clone()),
            ModelPattern::Prefix(_) => None,
        });
        let mut known: Vec<String> = by_model.keys().cloned().chain(exact).collect();
        known.sort_unstable();
        known.dedup();
        let pools = pools
            .iter()
            .map(|pool| PoolNames {
                aliases: pool.aliases.iter().cloned().collect(),
                names_models: !pool.models.is_empty(),
            })
            .collect();
        Self { rules, pools, by_model, known }
    }

    /// Whether the model's name can change where this request goes or what it is renamed to.
    /// When not, the body need not be read for routing.
    pub fn needs_model(&self, head: &Head<'_>) -> bool {
        let host = head.host.map(without_port);
        if let Some(rule) = self.rules.iter().find(|rule| rule.head_holds(head, host)) {
            let renames = self.pools.get(rule.pool).is_some_and(|pool| !pool.aliases.is_empty());
            return renames || !rule.models.is_empty();
        }
        match self.pools.as_slice() {
            [] => false,
            [only] => only.names_models || !only.aliases.is_empty(),
            _ => true,
        }
    }

    /// Where a request goes. `listed(pool, model)` says whether live backends of the pool list the
    /// model. The rules, the first that holds:
    ///
    /// 1. configured routes, in order;
    /// 2. a pool whose alias or configured `models` names the model, in the order of pools;
    /// 3. a pool whose live backends list it, in the same order;
    /// 4. the only pool, when it has configured no models: an unknown model is then its backends' business;
    /// 5. without a model (`GET /v1/files`, an unread body), the first pool;
    /// 6. nothing: the model is unknown.
    pub fn route<'t>(
        &'t self,
        head: &Head<'_>,
        model: Option<&str>,
        listed: &dyn Fn(usize, &str) -> bool,
    ) -> Result<Routed<'t>, NoRoute<'t>> {
        let host = head.host.map(without_port);
        let rule = self.rules.iter().find(|rule| rule.head_holds(head, host) && rule.model_holds(model));
        if let Some(rule) = rule {
            return Ok(self.routed(rule.pool, Some(rule.index), model));
        }
        if self.pools.is_empty() {
            return Err(NoRoute::NoPool);
        }
        let Some(name) = model else {
            return Ok(self.routed(0, None, None));
        };
        if let Some(&pool) = self.by_model.get(name) {
            return Ok(self.routed(pool, None, model));
        }
        if let Some(pool) = (0..self.pools.len()).find(|&pool| listed(pool, name)) {
            return Ok(self.routed(pool, None, model));
        }
        match self.pools.as_slice() {
            [only] if !only.names_models => Ok(self.routed(0, None, model)),
            _ => Err(NoRoute::UnknownModel { models: &self.known }),
        }
    }

    fn routed(&self, pool: usize, rule: Option<usize>, model: Option<&str>) -> Routed<'_> {
        let aliases = self.pools.get(pool).map(|pool| &pool.aliases);
        let rename = model.and_then(|model| aliases?.get(model)).map(String::as_str);
        Routed { pool, rule, rename }
    }
}

impl Rule {
    fn new(index: usize, pool: usize, route: &Route) -> Self {
        let host = route.host.as_deref().map(|host| match host.strip_prefix('*') {
            Some(suffix) => HostPattern::Below(suffix.to_ascii_lowercase()),
            None => HostPattern::Exact(host.to_ascii_lowercase()),
        });
        let models = route.models.iter().map(|model| match model.strip_suffix('*') {
            Some(prefix) => ModelPattern::Prefix(prefix.to_owned()),
            None => ModelPattern::Exact(model.clone()),
        });
        Self {
            pool,
            path_prefix: route.path_prefix.clone(),
            host,
            headers: route.headers.clone(),
            models: models.collect(),
            index,
        }
    }

    fn head_holds(&self, head: &Head<'_>, host: Option<&str>) -> bool {
        self.path_prefix.as_deref().is_none_or(|prefix| begins_with_segments(head.path, prefix))
            && self.host.as_ref().is_none_or(|pattern| host.is_some_and(|host| pattern.holds(host)))
            && self.headers.iter().all(|(name, wanted)| {
                head.headers.get_all(name).iter().any(|value| value.as_bytes() == wanted.as_bytes())
            })
    }

    fn model_holds(&self, model: Option<&str>) -> bool {
        self.models.is_empty()
            || model.is_some_and(|model| {
                self.models.iter().any(|pattern| match pattern {
                    ModelPattern::Exact(name) => name == model,
                    ModelPattern::Prefix(prefix) => model.starts_with(prefix.as_str()),
                })
            })
    }
}

impl HostPattern {
    /// Host names compare without case, and a final dot means the same name (RFC 3986 §3.2.2).
    fn holds(&self, host: &str) -> bool {
        let host = host.strip_suffix('.').unwrap_or(host).as_bytes();
        match self {
            Self::Exact(exact) => host.eq_ignore_ascii_case(exact.as_bytes()),
            Self::Below(suffix) => {
                let suffix = suffix.as_bytes();
                host.len() > suffix.len() && host[host.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
            }
        }
    }
}

fn begins_with_segments(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix)
        .is_some_and(|rest| prefix.ends_with('/') || rest.is_empty() || rest.starts_with('/'))
}

/// `host:port` without its port; `[::1]:80` keeps its brackets.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}
