//! Pools and their backends at run time: the records that outlive a reload, and the snapshot an attempt sees.
//!
//! `Backend` is what is known about one replica (health, load, connections, addresses) and is kept by
//! identity across reloads. `Pool` is one generation's view of a set of them. `Directory` swaps
//! generations in one atomic step. Judging is `policy::health`, choosing is `policy::balance`; here
//! observations are taken in, transitions are published, and in-flight work is counted.

mod backend;
mod each;
mod identity;
mod in_flight;
mod judge;
mod line;
mod load;
mod pick;
mod progress;
mod quarantine;
mod signs;
mod snapshot;
mod state;
mod tempo;
mod ward;

pub use backend::{Backend, BackendId, LastProbe, Listed, Record, exchange_number};
pub use each::{Place, for_each_backend};
pub use identity::{Doubts, WrongModels};
pub use in_flight::{InFlight, Unfinished};
pub use judge::{About, Receipt};
pub use line::{Joining, Line, Waiting};
pub use pick::{Choice, Class, Nobody, Wanted};
pub use quarantine::Canary;
pub use snapshot::{Applied, Directory, Member, Pool, Snapshot};
pub use state::PoolState;
pub use tempo::Hedge;
pub use ward::{Turn, Ward};
