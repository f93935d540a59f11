//! From request head and model name to a pool.
//!
//! Configured routes are tried first, in order, and all conditions of a route must hold; then the
//! model's name decides; then, with a single pool, that pool takes everything. The table is built
//! once per snapshot and a look-up allocates nothing. What is not done here: reading the body for
//! the model's name ([`Table::needs_model`] says whether that is worth it), and choosing a backend.

use std::collections::HashMap;
use std::time::Duration;

use http::{HeaderMap, HeaderName};

use super::admission::Priority;
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
    /// Instead of what the client's header says.
    pub priority: Option<Priority>,
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

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn pool(name: &str, models: &[&str], aliases: &[(&str, &str)]) -> PoolModels {
        PoolModels {
            name: name.to_owned(),
            models: models.iter().map(|&model| model.to_owned()).collect(),
            aliases: aliases.iter().map(|&(from, to)| (from.to_owned(), to.to_owned())).collect(),
        }
    }

    fn to(pool: &str) -> Route {
        Route { pool: pool.to_owned(), ..Route::default() }
    }

    fn nothing_listed(_: usize, _: &str) -> bool {
        false
    }

    fn head<'a>(path: &'a str, host: Option<&'a str>, headers: &'a HeaderMap) -> Head<'a> {
        Head { path, host, headers }
    }

    #[test]
    fn below_a_domain_is_a_name_with_something_before_it() {
        let below = HostPattern::Below(".example.com".to_owned());
        assert!(below.holds("a.Example.com."));
        assert!(!below.holds(".example.com"));
        assert!(!below.holds("com"));
    }

    #[test]
    fn one_pool_without_any_route_takes_everything_unread() {
        let table = Table::new(&[], &[pool("only", &[], &[])]);
        let headers = HeaderMap::new();
        let head = head("/v1/chat/completions", None, &headers);
        assert!(!table.needs_model(&head));
        for model in [None, Some("anything")] {
            assert_eq!(
                table.route(&head, model, &nothing_listed),
                Ok(Routed { pool: 0, rule: None, rename: None })
            );
        }
    }

    #[test]
    fn one_pool_that_names_its_models_refuses_others_with_a_list() {
        let table = Table::new(&[], &[pool("only", &["b", "a"], &[("x", "a")])]);
        let headers = HeaderMap::new();
        let head = head("/v1/chat/completions", None, &headers);
        assert!(table.needs_model(&head));
        let known = ["a", "b", "x"].map(str::to_owned);
        assert_eq!(
            table.route(&head, Some("c"), &nothing_listed),
            Err(NoRoute::UnknownModel { models: known.as_slice() })
        );
        assert_eq!(table.route(&head, Some("x"), &nothing_listed).map(|routed| routed.rename), Ok(Some("a")));
        assert_eq!(table.route(&head, Some("c"), &|_, model| model == "c").map(|routed| routed.pool), Ok(0));
        assert!(table.route(&head, None, &nothing_listed).is_ok());
    }

    #[test]
    fn names_decide_between_pools_configured_ones_before_listed_ones() {
        let pools = [pool("a", &[], &[]), pool("b", &["m"], &[("alias", "m")]), pool("c", &["m", "n"], &[])];
        let table = Table::new(&[], &pools);
        let headers = HeaderMap::new();
        let head = head("/", None, &headers);
        let pool_of = |model, listed: &dyn Fn(usize, &str) -> bool| {
            table.route(&head, model, listed).map(|routed| (routed.pool, routed.rename))
        };
        assert!(table.needs_model(&head));
        assert_eq!(pool_of(Some("m"), &|pool, _| pool == 0), Ok((1, None)));
        assert_eq!(pool_of(Some("alias"), &nothing_listed), Ok((1, Some("m"))));
        assert_eq!(pool_of(Some("n"), &nothing_listed), Ok((2, None)));
        assert_eq!(pool_of(Some("z"), &|pool, _| pool >= 1), Ok((1, None)));
        assert_eq!(pool_of(None, &nothing_listed), Ok((0, None)));
        assert!(matches!(pool_of(Some("z"), &nothing_listed), Err(NoRoute::UnknownModel { .. })));
    }

    #[test]
    fn without_pools_there_is_no_route() {
        let table = Table::new(&[to("gone")], &[]);
        let headers = HeaderMap::new();
        let head = head("/", None, &headers);
        assert!(!table.needs_model(&head));
        assert_eq!(table.route(&head, Some("m"), &nothing_listed), Err(NoRoute::NoPool));
    }

    #[test]
    fn all_conditions_of_a_route_must_hold() {
        let mut headers = HeaderMap::new();
        headers.append("x-tier", HeaderValue::from_static("gold"));
        headers.append("x-tier", HeaderValue::from_static("batch"));
        let name = HeaderName::from_static("x-tier");
        let with = |change: &dyn Fn(&mut Route)| {
            let mut route = to("b");
            change(&mut route);
            route
        };
        let path = |prefix: &str| with(&|route| route.path_prefix = Some(prefix.to_owned()));
        let host = |host: &str| with(&|route| route.host = Some(host.to_owned()));
        let header = |value: &str| with(&|route| route.headers = vec![(name.clone(), value.to_owned())]);
        let model = |model: &str| with(&|route| route.models = vec!["other".to_owned(), model.to_owned()]);
        let both = with(&|route| {
            route.path_prefix = Some("/v1".to_owned());
            route.host = Some("other".to_owned());
        });
        for (route, holds) in [
            (to("b"), true),
            (path("/v1"), true),
            (path("/v1/"), true),
            (path("/v1/chat"), true),
            (path("/v1/cha"), false),
            (path("/v1/chat/x"), false),
            (path("/"), true),
            (host("api.example.com"), true),
            (host("*.example.com"), true),
            (host("*.com"), true),
            (host("*.api.example.com"), false),
            (host("example.com"), false),
            (header("gold"), true),
            (header("batch"), true),
            (header("Gold"), false),
            (model("bge-m3"), true),
            (model("bge-*"), true),
            (model("*"), true),
            (model("bge-"), false),
            (both, false),
        ] {
            let table = Table::new(std::slice::from_ref(&route), &[pool("a", &[], &[]), pool("b", &[], &[])]);
            let head = head("/v1/chat", Some("API.Example.com.:8443"), &headers);
            let routed = table.route(&head, Some("bge-m3"), &|pool, _| pool == 0).unwrap();
            let expected = if holds { (1, Some(0)) } else { (0, None) };
            assert_eq!((routed.pool, routed.rule), expected, "{route:?}");
        }
    }

    #[test]
    fn a_route_that_the_head_decides_spares_reading_the_body() {
        let pools = [pool("plain", &[], &[]), pool("aliased", &[], &[("x", "y")])];
        let rule = |pool: &str, prefix: &str, models: &[&str]| Route {
            path_prefix: Some(prefix.to_owned()),
            models: models.iter().map(|&model| model.to_owned()).collect(),
            ..to(pool)
        };
        let routes = [
            rule("plain", "/a", &[]),
            rule("aliased", "/b", &[]),
            rule("plain", "/c", &["m"]),
            rule("plain", "/c", &[]),
        ];
        let table = Table::new(&routes, &pools);
        let headers = HeaderMap::new();
        for (path, needed) in [("/a", false), ("/b", true), ("/c", true), ("/d", true)] {
            assert_eq!(table.needs_model(&head(path, None, &headers)), needed, "{path}");
        }
        let routed = table.route(&head("/b", None, &headers), Some("x"), &nothing_listed);
        assert_eq!(routed, Ok(Routed { pool: 1, rule: Some(1), rename: Some("y") }));
    }

    #[test]
    fn an_ip_literal_keeps_its_brackets() {
        assert_eq!(without_port("[::1]:80"), "[::1]");
        assert_eq!(without_port("[::1]"), "[::1]");
        assert_eq!(without_port("a:80"), "a");
        assert_eq!(without_port("a"), "a");
    }

    fn names() -> impl Strategy<Value = Vec<String>> {
        proptest::collection::vec("[a-c]{1,2}", 0..3)
    }

    fn tables() -> impl Strategy<Value = (Vec<Route>, Vec<PoolModels>)> {
        let pools = proptest::collection::vec(
            (names(), proptest::collection::vec(("[a-c]{1,2}", "[x-z]"), 0..3)),
            1..4,
        );
        let routes = proptest::collection::vec(
            (
                0..4_usize,
                proptest::option::of("/[ab]"),
                proptest::option::of("[ab]|\\*\\.[ab]"),
                names(),
                any::<bool>(),
            ),
            0..4,
        );
        (routes, pools).prop_map(|(routes, pools)| {
            let pools: Vec<PoolModels> = pools
                .into_iter()
                .enumerate()
                .map(|(index, (models, aliases))| PoolModels { name: index.to_string(), models, aliases })
                .collect();
            let routes = routes
                .into_iter()
                .map(|(pool, path_prefix, host, mut models, star)| {
                    if let Some(model) = models.first_mut().filter(|_| star) {
                        model.push('*');
                    }
                    Route { path_prefix, host, models, ..to(&pool.to_string()) }
                })
                .collect();
            (routes, pools)
        })
    }

    proptest! {
        /// Reading the body is spared only where it could not have changed anything.
        #[test]
        fn where_the_model_is_not_needed_it_changes_nothing(
            (routes, pools) in tables(), path in "/[ab](/x)?", host in "[ab](\\.[ab])?", model in "[a-c]{1,2}", listed: bool
        ) {
            let table = Table::new(&routes, &pools);
            let headers = HeaderMap::new();
            let head = head(&path, Some(&host), &headers);
            let with = table.route(&head, Some(&model), &|_, _| listed);
            if !table.needs_model(&head) {
                prop_assert_eq!(with, table.route(&head, None, &|_, _| listed));
            }
            if let Ok(routed) = with {
                prop_assert!(routed.pool < pools.len());
                let aliases = &pools[routed.pool].aliases;
                let renamed = aliases.iter().any(|(alias, _)| *alias == model);
                prop_assert_eq!(routed.rename.is_some(), renamed);
                if let Some(rule) = routed.rule {
                    prop_assert_eq!(&routes[rule].pool, &pools[routed.pool].name);
                }
            }
        }
    }
}
