-- Whether an epoch that is being built holds all it shall: only then is it served without being asked twice.

alter table plait.view_epoch add column built boolean not null default false, add check (building is not null or not built);
comment on column plait.view_epoch.built is 'Everything that the epoch being built shall hold was acknowledged.';
