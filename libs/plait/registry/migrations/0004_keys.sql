-- API keys that are rotated: which key a new one replaces, and what a key is for.

alter table plait.api_key add column replaces text references plait.api_key (id);
alter table plait.api_key add column note text not null default '';
comment on column plait.api_key.replaces is 'The key this one was made to take over from; both are let in until the older one expires.';
